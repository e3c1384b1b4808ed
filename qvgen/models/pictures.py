"""The first frame of a clip as the picture that a pipeline is given: 8 bits a colour, so that training, evaluation and a user
who brings a file condition a model alike."""

from __future__ import annotations

from typing import Any

import torch


def first_frames(clips: torch.Tensor) -> torch.Tensor:
    """Of clips (n, 3, t, h, w) in [-1, 1]: (n, 3, h, w) uint8."""
    return ((clips[:, :, 0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def as_clips(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (n, 3, h, w) uint8 as clips of one frame (n, 3, 1, h, w) float32 in [-1, 1], as diffusers reads a picture."""
    return (pictures.float() / 255 * 2 - 1).unsqueeze(2)


def as_image(picture: torch.Tensor) -> Any:
    """A picture (3, h, w) uint8 as a PIL image."""
    from PIL import Image

    return Image.fromarray(picture.cpu().permute(1, 2, 0).contiguous().numpy())
