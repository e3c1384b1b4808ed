"""Clips of real videos: frames by time, upright, in the size of the model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
import torch.nn.functional as F

from qvgen.data.frames import TooFewFramesError, take, upright
from qvgen.models.family import ClipSize

MOST_PIXELS = 2**25  # of a frame: 7680 x 4320, 400 MB in float32


Start = Literal["first", "centre", "random"]


@dataclass(frozen=True)
class Place:
    """Where in a video a clip begins. Of the seconds that a clip leaves over, clip `number` of `clips` has an equal part to
    begin in: at its first moment, at its centre, or at one that depends on `seed`, the video's name and the number alone."""

    start: Start = "first"
    number: int = 0
    clips: int = 1
    seed: int = 0

    def seconds(self, name: str, spare: float) -> float:
        drawn = hashlib.sha256(f"{self.seed}\n{self.number}\n{name}".encode(errors="surrogateescape")).digest()
        within = {"first": 0.0, "centre": 0.5, "random": int.from_bytes(drawn[:7], "big") / 2**56}[self.start]
        return max(0.0, spare) * (self.number + within) / self.clips


BEGINNING = Place()


def read_clip(
    path: str | Path, size: ClipSize | Sequence[ClipSize], fps: float | None = None, place: Place = BEGINNING
) -> torch.Tensor:
    """`size.frames` frames as (3, t, h, w) float32 in [-1, 1], upright, resized to cover and cropped at the centre: those from
    `place` on, or with `fps` so many a second from there on (data/frames.py). Of several sizes, of as many frames each, the
    one whose aspect ratio is nearest.

    Raises ValueError if the file has no video, too few frames, too slow, too large or damaged ones.
    """
    frames: list[torch.Tensor] = []
    last, sizes = None, [size] if isinstance(size, ClipSize) else list(size)
    count = sizes[0].frames
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            coded = container.streams.video[0].codec_context
            if coded is None:
                raise ValueError(f"{path} cannot be read as a video: no decoder for its format")
            _check_pixels(path, "a frame", coded.height, coded.width)  # before the decoder takes memory for one
            decoded = (
                container.decode(video=0) if place == BEGINNING else _decode_from(container, Path(path), count, fps, place)
            )
            for frame in take(decoded, count, fps):
                if frame is not last:
                    pixels = _pixels(path, frame)
                    sizes = [nearest(sizes, *pixels.shape[:2])]
                frames.append(frames[-1] if frame is last else _cover(path, pixels, sizes[0]))
                last = frame
    except TooFewFramesError as error:
        raise ValueError(f"{path} {error}") from None
    except (av.FFmpegError, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from None
    return torch.cat(frames).permute(1, 0, 2, 3).contiguous()


def nearest(sizes: Sequence[ClipSize], height: int, width: int) -> ClipSize:
    """The size whose aspect ratio is nearest to that of height x width, as a quotient: the one that is cropped least."""
    return min(sizes, key=lambda size: abs(math.log(size.height * width / (size.width * height))))


def _decode_from(container: Any, path: Path, count: int, fps: float | None, place: Place) -> Iterator[Any]:
    """Decoded frames from the place on. Of a file that does not say how long it lasts the packets are counted."""
    stream = container.streams.video[0]
    rate = fps or (float(stream.average_rate) if stream.average_rate else 0.0)
    begins = float((stream.start_time or 0) * stream.time_base)
    if stream.duration:
        lasts = float(stream.duration * stream.time_base)
    elif container.duration:
        lasts = container.duration / av.time_base
    else:
        shown = [float(packet.pts * stream.time_base) for packet in container.demux(stream) if packet.pts is not None]
        lasts = max(shown, default=begins) - begins
        container.seek(0)
    wanted = begins + place.seconds(path.name, lasts - count / rate if rate else 0.0)
    if wanted > begins:
        container.seek(int(wanted / stream.time_base), stream=stream)  # to the key frame before it
    for frame in container.decode(video=0):
        if frame.time is None or frame.time >= wanted - 1e-6:  # microseconds: timestamps are rounded
            yield frame


def _pixels(path: str | Path, frame: Any) -> np.ndarray:
    """A decoded frame, upright, (h, w, 3) uint8."""
    _check_pixels(path, "a frame", frame.height, frame.width)
    if frame.is_corrupt:  # FFmpeg fills what is missing with what was there before
        raise ValueError(f"{path} cannot be read as a video: the frame at {frame.time or 0:.3g} s is damaged")
    try:
        return upright(frame)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _cover(path: str | Path, pixels: np.ndarray, size: ClipSize) -> torch.Tensor:
    """A frame as (1, 3, h, w), resized at once: a clip in its own resolution may take gigabytes."""
    height, width = pixels.shape[:2]
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2).float() / 127.5 - 1
    scale = max(size.height / height, size.width / width)
    cover = [max(size.height, round(height * scale)), max(size.width, round(width * scale))]
    _check_pixels(path, f"a frame that covers {size.width} x {size.height}", *cover)
    image = F.interpolate(image, size=cover, mode="bilinear", antialias=True, align_corners=False).clamp(-1, 1)
    top, left = (cover[0] - size.height) // 2, (cover[1] - size.width) // 2
    return image[:, :, top : top + size.height, left : left + size.width]


def _check_pixels(path: str | Path, what: str, height: int, width: int) -> None:
    if height * width > MOST_PIXELS:
        raise ValueError(f"{path}: {what} has {width} x {height} pixels, more than {MOST_PIXELS}: make the video smaller")
