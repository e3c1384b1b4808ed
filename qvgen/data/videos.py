"""Real videos with captions: a folder that holds captions.csv with columns file and caption."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import torch
import torch.nn.functional as F

from qvgen.data.frames import TooFewFramesError, take, upright
from qvgen.models.family import ClipSize

LONGEST_NAME = 255  # bytes of a part of a path
LONGEST_PATH = 2000  # bytes of an entry of column file; with the folder, systems allow 4095
MOST_PIXELS = 2**25  # of a frame: 7680 x 4320, 400 MB in float32


def read_captions(folder: str | Path) -> list[tuple[Path, str]]:
    """Video files and captions, in the order of captions.csv (UTF-8, with or without a byte-order mark).

    Raises ValueError, naming the line, for a missing or empty list, a missing file or one outside the folder, an empty
    caption, a caption with a comma that is not quoted, and a quote that is not closed.
    """
    folder = Path(folder)
    table = folder / "captions.csv"
    if not table.is_file():
        raise ValueError(f"{table} does not exist; write a CSV with columns file and caption, one row per video")
    (_, header), *lines = list(_read_table(table)) or [(1, [])]
    if not {"file", "caption"} <= set(header):
        raise ValueError(f"{table} must have columns file and caption, found {header!s:.200}")
    rows = []
    for line, fields in lines:
        if len(fields) != len(header):
            raise ValueError(
                f"{table} line {line} has {len(fields)} columns, the header {len(header)}: a caption with a comma needs "
                'quotes, file.mp4,"a red ball, bouncing"'
            )
        row = dict(zip(header, fields, strict=True))
        name, caption = row["file"].strip(), row["caption"].strip()
        lengths = [len(part.encode(errors="replace")) for part in Path(name).parts]
        if max(lengths, default=0) > LONGEST_NAME or sum(lengths) > LONGEST_PATH:
            raise ValueError(f"{table} line {line}: {name[:40]!r}... is longer than a file name can be")
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise ValueError(f"{table} line {line}: {name!r} must be a path inside {folder}")
        if not (folder / name).is_file():
            raise ValueError(f"{table} line {line}: {folder / name} does not exist")
        if not caption:
            raise ValueError(f"{table} line {line}: the caption of {name} is empty")
        rows.append((folder / name, caption))
    if not rows:
        raise ValueError(f"{table} lists no videos")
    return rows


def _read_table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV that are not blank, each with the line it begins on. Raises ValueError, naming that line."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader, line = csv.reader(file, strict=True), 1
        try:
            for fields in reader:
                if fields:
                    yield line, fields
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{path} line {line}: {error}; is a quote that begins there not closed?") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None


def read_clip(path: str | Path, size: ClipSize, fps: float | None = None) -> torch.Tensor:
    """`size.frames` frames as (3, t, h, w) float32 in [-1, 1], upright, resized to cover and cropped at the centre: the first
    ones, or with `fps` so many a second from the first on (data/frames.py).

    Raises ValueError if the file has no video, too few frames, too slow or too large ones.
    """
    frames: list[torch.Tensor] = []
    last = None
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            coded = container.streams.video[0].codec_context
            if coded is None:
                raise ValueError(f"{path} cannot be read as a video: no decoder for its format")
            _check_pixels(path, "a frame", coded.height, coded.width)  # before the decoder takes memory for one
            for frame in take(container.decode(video=0), size.frames, fps):
                frames.append(frames[-1] if frame is last else _cover(path, frame, size))
                last = frame
    except TooFewFramesError as error:
        raise ValueError(f"{path} {error}") from None
    except (av.FFmpegError, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from None
    return torch.cat(frames).permute(1, 0, 2, 3).contiguous()


def _cover(path: str | Path, frame: Any, size: ClipSize) -> torch.Tensor:
    """One decoded frame as (1, 3, h, w), resized at once: a clip in its own resolution may take gigabytes."""
    _check_pixels(path, "a frame", frame.height, frame.width)
    try:
        pixels = upright(frame)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
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
