"""Does a clip show what its caption says? The judge of the embedded data set: colour, direction, digit.

Colour and direction are read geometrically (mean colour of the lit pixels, path of the centre of mass); the digit by a
support vector machine fitted, each time anew, on training digits only. Nothing is stored, so nothing can go stale.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from qvgen.data.digits import COLOURS, DIRECTIONS, FRAMES, GLYPH, Attributes, glyphs, render

_MIN_BRIGHTNESS = 0.15  # pixels darker than this are background


@dataclass(frozen=True)
class Verdict:
    """Fraction of clips in [0, 1] whose colour, direction and digit agree with the caption."""

    colour: float
    direction: float
    digit: float

    def as_dict(self) -> dict[str, float]:
        return {"colour": self.colour, "direction": self.direction, "digit": self.digit}


def read_clips(clips: torch.Tensor) -> list[Attributes]:
    """The colours, directions and digits that the judge reads in clips (n, 3, t, h, w), float in [-1, 1]."""
    if clips.ndim != 5 or clips.shape[1] != 3:
        raise ValueError(f"clips must have shape (n, 3, t, h, w), got {tuple(clips.shape)}")
    rgb = ((clips.float() + 1) / 2).clamp(0, 1)
    brightness, centre = _mass(rgb)
    colour = _read_colour(rgb, brightness)
    direction = _read_direction(centre)
    crops = _centred_crops(brightness, centre)
    digit = _digit_classifier().predict(crops.flatten(1).numpy())
    rows = zip(colour.tolist(), direction.tolist(), digit.tolist(), strict=True)
    return [Attributes(*map(int, row)) for row in rows]


def judge(clips: torch.Tensor, expected: list[Attributes]) -> Verdict:
    """Compare clips (n, 3, t, h, w) in [-1, 1] with what their captions say."""
    if len(expected) != clips.shape[0] or not expected:
        raise ValueError(f"{clips.shape[0]} clips but {len(expected)} captions; give one caption per clip, at least one")
    seen = read_clips(clips)
    n = len(expected)
    return Verdict(
        colour=sum(s.colour == e.colour for s, e in zip(seen, expected, strict=True)) / n,
        direction=sum(s.direction == e.direction for s, e in zip(seen, expected, strict=True)) / n,
        digit=sum(s.digit == e.digit for s, e in zip(seen, expected, strict=True)) / n,
    )


def _mass(rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Brightness (n, t, h, w) with the background cut, and its centre (n, t, 2) as (y, x) in pixels."""
    brightness = rgb.amax(dim=1)
    brightness = torch.where(brightness > _MIN_BRIGHTNESS, brightness, 0.0)
    total = brightness.sum((-1, -2)).clamp(min=1e-6)
    y = (brightness.sum(-1) * torch.arange(rgb.shape[-2])).sum(-1) / total
    x = (brightness.sum(-2) * torch.arange(rgb.shape[-1])).sum(-1) / total
    return brightness, torch.stack([y, x], dim=-1)


def _read_colour(rgb: torch.Tensor, brightness: torch.Tensor) -> torch.Tensor:
    weight = brightness[:, None] ** 2
    mean = (rgb * weight).sum((-1, -2, -3)) / weight.sum((-1, -2, -3)).clamp(min=1e-6)
    palette = F.normalize(torch.tensor(list(COLOURS.values())), dim=-1)
    return (F.normalize(mean, dim=-1) @ palette.T).argmax(-1)


def _read_direction(centre: torch.Tensor) -> torch.Tensor:
    """Slope of the least-squares line through the centres, matched to the eight headings."""
    time = torch.arange(centre.shape[1], dtype=torch.float32)
    time = time - time.mean()
    velocity = (centre * time[None, :, None]).sum(1)
    return (velocity @ torch.tensor(list(DIRECTIONS.values())).T).argmax(-1)


def _centred_crops(brightness: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Mean over time of a 16x16 window that follows the digit: (n, 16, 16), each scaled to unit norm."""
    n, t, h, w = brightness.shape
    offset = torch.arange(GLYPH, dtype=torch.float32) - (GLYPH - 1) / 2
    y = (2 * (centre[..., 0:1] + offset) + 1) / h - 1
    x = (2 * (centre[..., 1:2] + offset) + 1) / w - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, :, None, :], y[:, :, :, None]), dim=-1)
    crops = F.grid_sample(brightness.reshape(n * t, 1, h, w), grid.reshape(n * t, GLYPH, GLYPH, 2), align_corners=False).view(
        n, t, GLYPH, GLYPH
    )
    return F.normalize(crops.mean(1).flatten(1), dim=-1).view(n, GLYPH, GLYPH)


@lru_cache(maxsize=1)
def _digit_classifier() -> Any:
    from sklearn.svm import SVC

    images, labels = glyphs(held_out=False)
    n, generator = len(images), torch.Generator().manual_seed(0)
    crops, targets = [], []
    for _ in range(2):  # two sub-pixel placements of each digit
        start = 2 + 6 * torch.rand(n, 2, generator=generator)
        velocity = torch.rand(n, 2, generator=generator)
        clips = render(images, torch.ones(n, 3), start, velocity)
        brightness, centre = _mass((clips + 1) / 2)
        assert brightness.shape[1] == FRAMES
        crops.append(_centred_crops(brightness, centre).flatten(1))
        targets.append(labels)
    svm: Any = SVC  # its annotations say that gamma is text
    return svm(C=10.0, gamma=3.0).fit(torch.cat(crops).numpy(), torch.cat(targets).numpy())
