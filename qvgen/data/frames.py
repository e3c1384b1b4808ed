"""Which frames of a video are shown when, and which way up: what players do and decoders leave to their callers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

_LEAST_SHARE = Fraction(3, 4)  # of the frames of a clip that must differ in time: 12 frames per second make one at 16


def resampled(path: str | Path, frames: Iterable[Any], fps: int, count: int, rate: Fraction | None) -> Iterator[Any]:
    """The frame on the screen at 0, 1 / fps, ... (count - 1) / fps seconds after the first; one that stays is given again.

    `frames`: decoded, in order of time; `rate`: the stream's frames per second, which tells when the last frame ends if it has
    no length of its own. Raises ValueError for a video that ends before, or whose frames are too few to show motion at this
    rate.
    """
    first: Fraction | None = None
    shown, end, given, used = None, Fraction(0), 0, 0
    for frame in frames:
        if frame.pts is None or frame.time_base is None:
            raise ValueError(f"{path} does not say when its frames are shown; set prepare.fps to native to take each")
        time = frame.pts * frame.time_base
        first = time if first is None else first
        before = given
        slack = min(frame.time_base, Fraction(1, 8 * fps))  # WebM and GIF round times to their ticks
        while shown is not None and given < count and Fraction(given, fps) < time - first - slack:
            yield shown
            given += 1
        used += given > before
        if given == count:
            break
        shown = frame
        length = (frame.duration or 0) * frame.time_base or (1 / Fraction(rate) if rate else Fraction(1, fps))
        end = time - first + length
    else:
        before = given
        while shown is not None and given < count and Fraction(given, fps) < end:
            yield shown
            given += 1
        used += given > before
    if given < count:
        raise ValueError(
            f"{path} lasts {float(end):.2f} s, too short for {count} frames at {fps} frames per second "
            f"({count / fps:.2f} s); remove it, lower prepare.frames or raise prepare.fps"
        )
    if used < _LEAST_SHARE * count:
        raise ValueError(
            f"{path} shows {used} frames in the time of {count} at {fps} frames per second: motion would stutter; "
            "remove it or lower prepare.fps"
        )


def upright(frame: Any) -> np.ndarray:
    """Pixels (h, w, 3) uint8 of a decoded frame, turned as its display matrix says: phones store portrait clips lying down."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
