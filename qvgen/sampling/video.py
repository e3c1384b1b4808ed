"""Clips to files: .mp4 (H.264), .gif, and .png with the frames in a row; comparison pictures for people.

A clip is a tensor (3, t, h, w) in [-1, 1]. Small clips are magnified by a whole factor, nearest pixel, so that the
32-pixel embedded videos can be seen. A file is written beside its place and renamed, so that a full disk or Ctrl-C
leaves the old one whole. The same clip gives the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

SUFFIXES = (".mp4", ".gif", ".png")
_VISIBLE = 256  # pixels that the shorter side of a written video has at least
_STRIP_VISIBLE = 64  # the same for a frame in a row of frames
_STRIP_FRAMES = 9  # that stand for a clip in a contact sheet
_MARGIN = 4

# So that the same frames give the same bytes: with x264's macroblock tree 4 of 30 clips came out in two or three ways, and its
# assembly depends on the processor. Without both, 49 frames of 480 x 832 take 5 s instead of 1.2 (LOG.md).
_X264 = {"crf": "16", "preset": "medium", "x264-params": "mbtree=0:asm=0"}
_MPEG4 = {"qscale": "2"}


def check_suffix(path: str | Path) -> str:
    """The suffix of `path`, lower case. Raises ValueError for one that `write_video` cannot write."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"cannot write {str(path)!r}: the name must end in one of {', '.join(SUFFIXES)}")
    return suffix


def write_video(path: str | Path, clip: torch.Tensor, fps: int = 8) -> None:
    """Write a clip (3, t, h, w) in [-1, 1]; the suffix of `path` chooses the format. `fps`: frames per second."""
    path, suffix = Path(path), check_suffix(path)
    if clip.ndim != 4 or clip.shape[0] != 3 or clip.shape[1] < 1:
        raise ValueError(f"a clip has shape (3, t, h, w) with t >= 1, got {tuple(clip.shape)}")
    if suffix == ".png":
        frames = _magnify(_to_pixels(clip), _STRIP_VISIBLE)
        _write_beside(path, lambda temporary: _write_png(temporary, _row(list(frames))))
        return
    frames = _magnify(_to_pixels(clip), _VISIBLE)
    writer = _write_mp4 if suffix == ".mp4" else _write_gif
    _write_beside(path, lambda temporary: writer(temporary, frames, fps))


def side_by_side(clips: Sequence[torch.Tensor], labels: Sequence[str]) -> torch.Tensor:
    """One clip (3, t, H, W) in [-1, 1] with the clips (3, t, h, w) next to each other, each under its label."""
    if len(clips) != len(labels) or not clips:
        raise ValueError(f"{len(clips)} clips but {len(labels)} labels; give one label per clip, at least one")
    panels = []
    for clip, label in zip(clips, labels, strict=True):
        frames = _magnify(_to_pixels(clip), _VISIBLE)
        caption = _caption(label, frames.shape[2]).expand(frames.shape[0], -1, -1, -1)
        panels.append(torch.cat([caption, frames], dim=1))
    gap = torch.full((*panels[0].shape[:2], _MARGIN, 3), 255, dtype=torch.uint8)
    joined = [part for panel in panels for part in (gap, panel)][1:]
    return torch.cat(joined, dim=2).permute(3, 0, 1, 2).float() / 127.5 - 1


def contact_sheet(
    path: str | Path, rows: Sequence[Sequence[torch.Tensor]], labels: Sequence[str], headings: Sequence[str] = ()
) -> None:
    """PNG with one line per entry of `rows`: its label, then each of its clips (3, t, h, w) as a row of frames.

    A long clip is shown by 9 evenly spread frames. `headings` name the columns, one per clip of a line.
    """
    if check_suffix(path) != ".png":
        raise ValueError(f"a contact sheet is a picture: {str(path)!r} must end in .png")
    if len(rows) != len(labels) or not rows:
        raise ValueError(f"{len(rows)} rows but {len(labels)} labels; give one label per row, at least one")
    strips = [[_row(list(_magnify(_to_pixels(_thin(clip)), _STRIP_VISIBLE))) for clip in row] for row in rows]
    lines = []
    if headings:
        names = [_caption(text, strip.shape[1]) for text, strip in zip(headings, strips[0], strict=True)]
        lines.append(_row(names, gap=4 * _MARGIN))
    for label, row in zip(labels, strips, strict=True):
        pictures = _row(row, gap=4 * _MARGIN)
        lines += [_caption(label, pictures.shape[1]), pictures]
    sheet = torch.cat([_pad_width(line, max(part.shape[1] for part in lines)) for line in lines])
    _write_beside(Path(path), lambda temporary: _write_png(temporary, sheet))


def _to_pixels(clip: torch.Tensor) -> torch.Tensor:
    """(3, t, h, w) in [-1, 1] -> (t, h, w, 3) uint8."""
    return ((clip.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)


def _magnify(frames: torch.Tensor, visible: int) -> torch.Tensor:
    factor = max(1, -(-visible // min(frames.shape[1:3])))
    return frames.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def _thin(clip: torch.Tensor) -> torch.Tensor:
    frames = clip.shape[1]
    if frames <= _STRIP_FRAMES:
        return clip
    return clip[:, torch.linspace(0, frames - 1, _STRIP_FRAMES).round().long()]


def _row(pictures: list[torch.Tensor], gap: int = _MARGIN) -> torch.Tensor:
    """Pictures (h, w, 3) of one height joined from left to right on white."""
    height = max(picture.shape[0] for picture in pictures)
    white = torch.full((height, gap, 3), 255, dtype=torch.uint8)
    aligned = [torch.cat([white[:1, :1].expand(height - p.shape[0], p.shape[1], 3), p]) for p in pictures]
    return torch.cat([part for picture in aligned for part in (white, picture)][1:], dim=1)


def _pad_width(picture: torch.Tensor, width: int) -> torch.Tensor:
    missing = torch.full((picture.shape[0], width - picture.shape[1], 3), 255, dtype=torch.uint8)
    return torch.cat([picture, missing], dim=1)


def _caption(text: str, width: int) -> torch.Tensor:
    """A white strip (18, width, 3) uint8 with black text."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    strip = Image.new("RGB", (width, 18), "white")
    ImageDraw.Draw(strip).text((_MARGIN, 2), text, fill="black", font=ImageFont.load_default(size=12))
    return torch.from_numpy(np.array(strip))


def _write_beside(path: Path, write: Any) -> None:
    """Call `write` with a temporary path of the same suffix in the same folder, then rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_png(path: Path, picture: torch.Tensor) -> None:
    from PIL import Image

    Image.fromarray(picture.numpy()).save(path, format="PNG")


def _write_gif(path: Path, frames: torch.Tensor, fps: int) -> None:
    from PIL import Image

    first, *others = [Image.fromarray(frame.numpy()) for frame in frames]
    # Pillow merges equal neighbours and adds up their durations: fewer frames, the same film.
    first.save(path, format="GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0, optimize=False)


def _write_mp4(path: Path, frames: torch.Tensor, fps: int) -> None:
    import av
    from av.codec.context import Flags

    frames = _even(frames)
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    # bitexact keeps version and time out of the container; one thread keeps the bits independent of the core count.
    with av.open(str(path), "w", options={"fflags": "+bitexact", "movflags": "+faststart"}) as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= Flags.bitexact
        stream.options = dict(_X264 if codec == "libx264" else _MPEG4)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        container.mux(stream.encode())


def _even(frames: torch.Tensor) -> torch.Tensor:
    """Repeat the last row or column where a side is odd: yuv420p halves both."""
    if frames.shape[1] % 2:
        frames = torch.cat([frames, frames[:, -1:]], dim=1)
    if frames.shape[2] % 2:
        frames = torch.cat([frames, frames[:, :, -1:]], dim=2)
    return frames.contiguous()
