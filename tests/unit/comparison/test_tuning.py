"""Which learning rate the comparison takes: smallest error among rates with equally good videos."""

from __future__ import annotations

import pytest

from comparison.tuning import TIE_DB, choose


@pytest.mark.parametrize(
    ("psnr_db", "velocity_mse", "chosen"),
    [
        ((25.0, 26.0, 24.0), (0.3, 0.2, 0.1), 1.0),  # the last has the smallest error, and worse videos
        ((26.0, 26.0 - TIE_DB / 2, 24.0), (0.3, 0.2, 0.1), 1.0),  # a tie of videos: the error decides
        ((26.0, 26.0 - TIE_DB / 2, 25.9), (0.3, 0.2, 0.4), 1.0),
        ((26.0, 26.0 - 2 * TIE_DB, 24.0), (0.3, 0.2, 0.1), 0.5),
    ],
)
def test_the_smallest_error_among_equally_good_videos(
    psnr_db: tuple[float, ...], velocity_mse: tuple[float, ...], chosen: float
) -> None:
    pairs = zip(psnr_db, velocity_mse, strict=True)
    rates = {rate: {"psnr_db": p, "velocity_mse": v} for rate, (p, v) in zip((0.5, 1.0, 4.0), pairs, strict=True)}
    assert choose(rates) == chosen
