"""The embedded data set: coloured handwritten digits that move, with captions that state the ground truth.

Source images are the 1,797 digits (8x8) that ship inside scikit-learn, scaled to 16x16. A clip shows one digit in one of
five colours moving in one of eight directions at 1.0-1.75 pixels per frame, so that a caption such as "a red digit three
moving up and left" can be checked on a generated clip. 1,500 digits, drawn once by a fixed permutation (the file is sorted
by writer), are for training; the other 297 are held out.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

FRAMES, SIZE, GLYPH = 9, 32, 16
TRAIN_DIGITS = 1500
SPEED_RANGE = (1.0, 1.75)  # pixels per frame

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.15, 0.15),
    "green": (0.15, 1.0, 0.15),
    "blue": (0.25, 0.35, 1.0),
    "yellow": (1.0, 1.0, 0.1),
    "white": (1.0, 1.0, 1.0),
}
# Unit vectors (dy, dx); y grows downwards.
_D = 2**-0.5
DIRECTIONS: dict[str, tuple[float, float]] = {
    "up": (-1.0, 0.0),
    "down": (1.0, 0.0),
    "left": (0.0, -1.0),
    "right": (0.0, 1.0),
    "up and left": (-_D, -_D),
    "up and right": (-_D, _D),
    "down and left": (_D, -_D),
    "down and right": (_D, _D),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Attributes:
    """Ground truth of one caption: indices into COLOURS, DIRECTIONS and DIGITS."""

    colour: int
    direction: int
    digit: int

    @property
    def caption(self) -> str:
        return f"a {list(COLOURS)[self.colour]} digit {DIGITS[self.digit]} moving {list(DIRECTIONS)[self.direction]}"


ALL_ATTRIBUTES: tuple[Attributes, ...] = tuple(
    itertools.starmap(Attributes, itertools.product(range(len(COLOURS)), range(len(DIRECTIONS)), range(len(DIGITS))))
)
_BY_CAPTION = {a.caption: a for a in ALL_ATTRIBUTES}


def parse_caption(caption: str) -> Attributes:
    """Attributes of a caption. Raises ValueError for a caption outside the 400 of this data set."""
    try:
        return _BY_CAPTION[caption.strip().lower()]
    except KeyError:
        raise ValueError(
            f"caption {caption!r} is not one of the {len(_BY_CAPTION)} of the embedded data set; "
            f"write it like {ALL_ATTRIBUTES[0].caption!r}"
        ) from None


@lru_cache(maxsize=2)
def glyphs(held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Digit images (n, 16, 16) float32 in [0, 1] and their labels (n,) int64, from the training or the held-out part."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0)).numpy()
    part = order[TRAIN_DIGITS:] if held_out else order[:TRAIN_DIGITS]
    images = torch.as_tensor(data.images[part], dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(GLYPH, GLYPH), mode="bicubic", align_corners=False).clamp(0, 1)[:, 0]
    return images, torch.as_tensor(data.target[part], dtype=torch.int64)


def render(
    glyph_NHW: torch.Tensor, colour_N3: torch.Tensor, start_N2: torch.Tensor, velocity_N2: torch.Tensor
) -> torch.Tensor:
    """Clips (n, 3, 9, 32, 32) float32 in [-1, 1] of glyphs that start with their corner at `start` (y, x pixels) and move
    by `velocity` pixels per frame; positions between pixels are interpolated bilinearly."""
    n = glyph_NHW.shape[0]
    corner_NT2 = start_N2[:, None] + velocity_N2[:, None] * torch.arange(FRAMES)[None, :, None]
    pixel = torch.arange(SIZE, dtype=torch.float32)
    # Position of each output pixel inside the glyph, normalised as grid_sample wants it (align_corners=False).
    y_NTS = (2 * (pixel - corner_NT2[..., 0:1]) + 1) / GLYPH - 1
    x_NTS = (2 * (pixel - corner_NT2[..., 1:2]) + 1) / GLYPH - 1
    grid = torch.stack(torch.broadcast_tensors(x_NTS[:, :, None, :], y_NTS[:, :, :, None]), dim=-1)
    frames = F.grid_sample(
        glyph_NHW[:, None, None].expand(-1, FRAMES, -1, -1, -1).reshape(n * FRAMES, 1, GLYPH, GLYPH),
        grid.reshape(n * FRAMES, SIZE, SIZE, 2),
        mode="bilinear",
        align_corners=False,
    ).view(n, 1, FRAMES, SIZE, SIZE)
    return frames * colour_N3[:, :, None, None, None] * 2 - 1


def sample_clips(attributes: list[Attributes], generator: torch.Generator, *, held_out: bool = False) -> torch.Tensor:
    """One random clip (n, 3, 9, 32, 32) in [-1, 1] per entry: a random digit image of its class, start and speed."""
    images, labels = glyphs(held_out)
    wanted = torch.tensor([a.digit for a in attributes])
    draw = torch.rand(len(attributes), generator=generator)
    members = [torch.nonzero(labels == d).flatten() for d in range(len(DIGITS))]
    index = torch.stack([members[d][int(u * len(members[d]))] for d, u in zip(wanted.tolist(), draw, strict=True)])
    colour = torch.tensor(list(COLOURS.values()))[[a.colour for a in attributes]]
    heading = torch.tensor(list(DIRECTIONS.values()))[[a.direction for a in attributes]]
    low, high = SPEED_RANGE
    speed = low + (high - low) * torch.rand(len(attributes), 1, generator=generator)
    travel = heading * speed * (FRAMES - 1)
    # The whole digit stays in the picture: the corner may range over [0, 16] at the first and at the last frame.
    first = torch.clamp(-travel, min=0)
    last = SIZE - GLYPH - torch.clamp(travel, min=0)
    start = first + (last - first) * torch.rand(len(attributes), 2, generator=generator)
    return render(images[index], colour, start, heading * speed)
