"""Videos as people have them: other containers and codecs, no suffix, sound, odd sizes; and files that are none or damaged."""

import shutil
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from qvgen.data.videos import Place, read_clip
from qvgen.models.family import ClipSize

FPS, FRAMES, STEP = 10, 30, 8  # grey levels between frames: lossy codecs and palettes change them by less than half of it
Formats = dict[str, tuple[str, str, str, dict[str, str]]]  # suffix -> format, codec, pixels, options
FORMATS: Formats = {
    ".mp4": ("mp4", "libx264", "yuv420p", {"crf": "4", "g": "7", "bf": "2"}),
    ".webm": ("webm", "libvpx-vp9", "yuv420p", {"crf": "8", "b:v": "0", "g": "7"}),
    ".mkv": ("matroska", "libx264", "yuv420p", {"crf": "4", "g": "7"}),
    ".avi": ("avi", "mpeg4", "yuv420p", {"qscale": "2", "g": "7"}),
    ".mov": ("mov", "mjpeg", "yuvj420p", {"qscale": "2"}),
    ".gif": ("gif", "gif", "rgb8", {}),
}


def size(frames: int, height: int = 32, width: int = 48) -> ClipSize:
    return ClipSize(frames, height, width, max_sequence_length=8)


def write(path: Path, suffix: str, height: int = 32, width: int = 48, sound: bool = False) -> Path:
    """FRAMES frames, of which frame i has the grey level i STEP, at FPS a second."""
    container_format, codec, pixels, options = FORMATS[suffix]
    with av.open(str(path), "w", format=container_format) as container:
        stream: Any = container.add_stream(codec, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        audio: Any = container.add_stream("aac", rate=8000) if sound else None
        for index in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), STEP * index, np.uint8), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            container.mux(stream.encode(frame.reformat(format=pixels)))
        container.mux(stream.encode(None))
        if sound:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 8000, 0
            container.mux(audio.encode(silence))
            container.mux(audio.encode(None))
    return path


def turned(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Write a display matrix into the track header of an mp4, as phones do."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (part << 16 for part in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def levels(clip: torch.Tensor) -> torch.Tensor:
    return (clip.mean(dim=(0, 2, 3)) + 1) * 127.5 / STEP


@pytest.fixture(scope="module", params=[*FORMATS])
def video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("videos") / f"a{request.param}", request.param)


PALETTE = 36 / STEP  # levels: rgb8 has 8 of red and green, 4 of blue


@pytest.mark.parametrize(("fps", "step"), [(None, 1), (FPS, 1), (FPS / 2, 2)])
def test_frames_of_every_container(video: Path, fps: float | None, step: int) -> None:
    found = levels(read_clip(video, size(9), fps))
    near = PALETTE if video.suffix == ".gif" else 0.5
    assert (found - torch.arange(0, 9 * step, step)).abs().max() < near, found


@pytest.mark.parametrize("fps", [None, FPS])
def test_clips_begin_where_they_should_in_every_container(video: Path, fps: float | None) -> None:
    """Also where the file does not say how long it lasts, and where key frames lie elsewhere."""
    near = PALETTE if video.suffix == ".gif" else 0.5
    for number, begins in enumerate((0, 7, 14)):
        found = levels(read_clip(video, size(9), fps, Place("first", number, 3)))
        assert (found - torch.arange(begins, begins + 9)).abs().max() < near, (number, found)


def test_a_suffix_does_not_count(video: Path, tmp_path: Path) -> None:
    expected = read_clip(video, size(9), FPS)
    for name in ("clip", "clip.mp4", "clip.gif", "Klipp ☃ %d 100%"):
        shutil.copy(video, tmp_path / name)
        assert torch.equal(read_clip(tmp_path / name, size(9), FPS), expected), name


def test_sound_odd_sizes_and_portrait(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", ".gif", 31, 47)  # odd: yuv420p has none
    assert read_clip(path, size(9), FPS).shape == (3, 9, 32, 48)
    path = write(tmp_path / "b.mp4", ".mp4", 96, 54, sound=True)
    clip = read_clip(path, size(9), FPS)
    assert clip.shape == (3, 9, 32, 48) and (levels(clip) - torch.arange(9)).abs().max() < 0.5


def test_the_nearest_aspect_ratio_is_taken(tmp_path: Path) -> None:
    """As a quotient: 1:2 is as far from 1:1 as 2:1. Turned by metadata a video is portrait."""
    sizes = [size(5, 32, 48), size(5, 48, 32), size(5, 32, 32)]
    for height, width, expected in (
        (32, 48, 0),
        (90, 160, 0),
        (48, 32, 1),
        (160, 90, 1),
        (64, 64, 2),
        (40, 48, 2),
        (38, 48, 0),
    ):
        clip = read_clip(write(tmp_path / "a.mp4", ".mp4", height, width), sizes, FPS)
        assert clip.shape == (3, 5, sizes[expected].height, sizes[expected].width), (height, width)
        assert torch.equal(clip, read_clip(tmp_path / "a.mp4", sizes[expected], FPS))
    path = turned(write(tmp_path / "b.mp4", ".mp4", 32, 48), (0, 1, -1, 0))
    assert read_clip(path, sizes, FPS, Place("centre")).shape == (3, 5, 48, 32)


def test_too_short(video: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"a\{video.suffix} lasts .* \({FRAMES} frames\), {FRAMES + 3} frames at 10 a second"
    ):
        read_clip(video, size(FRAMES + 3), FPS)
    with pytest.raises(ValueError, match=rf"a\{video.suffix} has {FRAMES} frames, {FRAMES + 1} are needed"):
        read_clip(video, size(FRAMES + 1))


def test_cut_off_files_give_what_is_whole_or_an_error(video: Path, tmp_path: Path) -> None:
    """Whatever is left, a clip of the frames that it has or a ValueError that names the file; never other frames. But a gif
    does not tell: what is missing of its last frame is that of the frame before."""
    whole, refused, told = video.read_bytes(), 0, 8 if video.suffix == ".gif" else 9
    expected = read_clip(video, size(9))
    for share in (0.05, 0.3, 0.5, 0.7, 0.95):
        path = tmp_path / f"cut{video.suffix}"
        path.write_bytes(whole[: int(share * len(whole))])
        try:
            found = read_clip(path, size(9))
        except ValueError as error:
            assert path.name in str(error)
            refused += 1
        else:
            assert torch.equal(found[:, :told], expected[:, :told]), share
    assert refused


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_damaged_frames_are_refused(suffix: str, tmp_path: Path) -> None:
    """Bits of the middle are turned: FFmpeg would hide most of it, and training would learn what it made up."""
    whole, drawn, refused = write(tmp_path / "whole", suffix).read_bytes(), np.random.default_rng(0), 0
    expected = read_clip(tmp_path / "whole", size(FRAMES))
    for _ in range(30):
        damaged = bytearray(whole)
        for at in drawn.integers(len(whole) // 10, len(whole) * 9 // 10, 3):
            damaged[at] ^= 1 << int(drawn.integers(8))
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            found = read_clip(tmp_path / "damaged", size(FRAMES))
        except ValueError as error:
            refused += "is damaged" in str(error)
        else:
            assert torch.equal(found, expected)
    assert refused


@pytest.mark.parametrize("name", ["empty.mp4", "text.webm", "noise.gif", "zeros.avi", "sound.mp4", "folder.mp4"])
def test_what_is_no_video_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path, noise = tmp_path / name, np.random.default_rng(0).bytes(20_000)
    contents = {"empty.mp4": b"", "text.webm": b"<html>404 Not Found</html>\n", "noise.gif": noise, "zeros.avi": bytes(20_000)}
    if name == "sound.mp4":
        with av.open(str(path), "w") as container:
            audio: Any = container.add_stream("aac", rate=8000)
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 8000, 0
            container.mux(audio.encode(silence))
            container.mux(audio.encode(None))
    elif name == "folder.mp4":
        path.mkdir()
    else:
        path.write_bytes(contents[name])
    for place in (Place(), Place("centre")):
        with pytest.raises(ValueError, match=rf"{name} cannot be read as a video"):
            read_clip(path, size(9), FPS, place)
