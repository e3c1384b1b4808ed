"""The first frame that somebody gives to a model that makes videos from one: upright, in the size of the clip."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from qvgen.models.family import SamplingSettings

FORMATS = ("PNG", "JPEG", "WEBP")


def read_first_frame(path: Path, settings: SamplingSettings) -> torch.Tensor:
    """(3, h, w) uint8 of a picture, resized to cover and cropped at the centre. Raises ValueError for a file that is none."""
    from qvgen.data.videos import read_clip
    from qvgen.models.family import ClipSize
    from qvgen.models.pictures import first_frames

    return first_frames(read_clip(path, ClipSize(1, settings.height, settings.width, 0))[None])[0]


def decode_first_frame(data: bytes, settings: SamplingSettings) -> torch.Tensor:
    """`read_first_frame` of a picture that a stranger sent. Raises ValueError for all that is not one of FORMATS, before
    anything is decoded: what reads files knows others, some of which name more files to read."""
    from PIL import Image

    try:
        Image.open(io.BytesIO(data), formats=FORMATS).close()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image must be one of {', '.join(FORMATS)}, and whole: {error!s:.100}") from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        path.write_bytes(data)
        try:
            return read_first_frame(path, settings)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), "the image")) from None
