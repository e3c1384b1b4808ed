"""Real videos with captions: a folder that holds captions.csv with columns file and caption."""

from __future__ import annotations

import csv
from pathlib import Path

import av
import torch
import torch.nn.functional as F

from qvgen.models.family import ClipSize


def read_captions(folder: str | Path) -> list[tuple[Path, str]]:
    """Video files and captions, in the order of captions.csv. Raises ValueError for a missing or empty list, a missing
    file, an empty caption."""
    folder = Path(folder)
    table = folder / "captions.csv"
    if not table.is_file():
        raise ValueError(f"{table} does not exist; write a CSV with columns file and caption, one row per video")
    with table.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"file", "caption"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{table} must have columns file and caption, found {reader.fieldnames}")
        rows = [(folder / row["file"], (row["caption"] or "").strip()) for row in reader]
    if not rows:
        raise ValueError(f"{table} lists no videos")
    for line, (path, caption) in enumerate(rows, start=2):
        if not path.is_file():
            raise ValueError(f"{table} line {line}: {path} does not exist")
        if not caption:
            raise ValueError(f"{table} line {line}: the caption of {path.name} is empty")
    return rows


def read_clip(path: str | Path, size: ClipSize) -> torch.Tensor:
    """The first `size.frames` frames as (3, t, h, w) float32 in [-1, 1], resized to cover and cropped at the centre.

    Raises ValueError if the file has no video or too few frames.
    """
    frames: list[torch.Tensor] = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
                if len(frames) == size.frames:
                    break
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from None
    if len(frames) < size.frames:
        raise ValueError(f"{path} has {len(frames)} frames, {size.frames} are needed; remove it or lower prepare.frames")
    video = torch.stack(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    scale = max(size.height / video.shape[2], size.width / video.shape[3])
    cover = [max(size.height, round(video.shape[2] * scale)), max(size.width, round(video.shape[3] * scale))]
    video = F.interpolate(video, size=cover, mode="bilinear", antialias=True, align_corners=False).clamp(-1, 1)
    top, left = (cover[0] - size.height) // 2, (cover[1] - size.width) // 2
    return video[:, :, top : top + size.height, left : left + size.width].permute(1, 0, 2, 3).contiguous()
