"""Which frames of a video make a clip, by their timestamps, and which way up they stand."""

import json
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from qvgen.data.videos import Place, read_clip
from qvgen.models.family import ClipSize
from qvgen.models.rate import frame_rate

STEP = 6  # grey levels between frames; the codec changes them by less than half of it
ONE = 1 << 16


def size(frames: int, height: int = 32, width: int = 32) -> ClipSize:
    return ClipSize(frames, height, width, max_sequence_length=8)


def write(path: Path, milliseconds: list[float], image: np.ndarray | None = None) -> Path:
    """A video whose frame i is grey of level i STEP, or `image`, and is shown from `milliseconds[i]` on."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"crf": "1", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = (
            (32, 32, "yuv444p") if image is None else (*image.shape[1::-1], "yuv444p")
        )
        stream.time_base = stream.codec_context.time_base = Fraction(1, 90_000)
        for index, time in enumerate(milliseconds):
            grey = np.full((32, 32, 3), STEP * index, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey if image is None else image, format="rgb24")
            frame.pts, frame.time_base = round(time * 90), Fraction(1, 90_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def indices(clip: torch.Tensor) -> list[int]:
    return ((clip.mean(dim=(0, 2, 3)) + 1) * 127.5 / STEP).round().int().tolist()


def even(count: int, fps: float) -> list[float]:
    return [1000 * index / fps for index in range(count)]


@pytest.mark.parametrize(
    ("milliseconds", "fps", "frames", "expected"),
    [
        (even(9, 16), 16, 9, list(range(9))),
        (even(33, 60), 16, 9, [0, 4, 7, 11, 15, 19, 22, 26, 30]),
        (even(17, 16), 8, 9, list(range(0, 17, 2))),
        (even(9, 24), None, 5, [0, 1, 2, 3, 4]),
        (even(20, 30000 / 1001), 15, 9, list(range(0, 17, 2))),
        (even(9, 23.976), 24, 9, list(range(9))),
        ([round(t) + 500 for t in even(9, 16)], 16, 9, list(range(9))),  # milliseconds, and a late start
        ([0, 62.5, 70, 80, 125, 187.5, 190, 250, 300], 16, 5, [0, 1, 4, 5, 7]),  # a variable rate
        (even(11, 15), 16, 11, [0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 9]),  # one in ten may be repeated
        (even(2, 16), 16, 1, [0]),
        ([0], 16, 1, [0]),
    ],
)
def test_frames_are_taken_by_time(
    tmp_path: Path, milliseconds: list[float], fps: float | None, frames: int, expected: list[int]
) -> None:
    path = write(tmp_path / "a.mp4", milliseconds)
    assert indices(read_clip(path, size(frames), fps)) == expected


@pytest.mark.parametrize(
    ("milliseconds", "fps", "says"),
    [
        (even(8, 16), 16, r"lasts 0.5 s \(8 frames\), 9 frames at 16 a second take 0.562 s; remove it or lower"),
        (even(20, 60), 16, r"lasts 0.333 s \(20 frames\), 9 frames at 16 a second take 0.562 s"),
        (even(9, 8), 16, "too slow for 16 a second, where frames would be repeated; .* prepare.fps to what the videos have"),
        ([0], 16, r"lasts 0.0625 s \(1 frames\), 9 frames at 16 a second"),
        ([0], None, "has 1 frames, 9 are needed"),
        ([*even(3, 16), 10_000], 16, "too slow for 16"),
    ],
)
def test_short_and_slow_clips_are_refused(tmp_path: Path, milliseconds: list[float], fps: float | None, says: str) -> None:
    path = write(tmp_path / "a.mp4", milliseconds)
    with pytest.raises(ValueError, match=rf"a\.mp4 .*{says}"):
        read_clip(path, size(9), fps)


def test_an_image_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.png"), "w") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "rgb24"
        container.mux(stream.encode(av.VideoFrame(32, 32, "rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"a\.png lasts .* \(1 frames\), 5 frames at 16 a second"):
        read_clip(tmp_path / "a.png", size(5), 16)


def turned(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Write a display matrix into the track header of an mp4, as phones do."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (part * ONE for part in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


CASES: dict[str, tuple[tuple[int, int, int, int], int, Callable[[np.ndarray], np.ndarray]]] = {
    "upright": ((1, 0, 0, 1), 0, lambda image: image),
    "clockwise": ((0, 1, -1, 0), -90, lambda image: np.rot90(image, -1)),
    "upside down": ((-1, 0, 0, -1), 180, lambda image: np.rot90(image, 2)),
    "counterclockwise": ((0, -1, 1, 0), 90, lambda image: np.rot90(image, 1)),
    "mirrored": ((-1, 0, 0, 1), 180, lambda image: image[:, ::-1]),
    "transposed": ((0, 1, 1, 0), -90, lambda image: image.transpose(1, 0, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_display_matrix_is_applied(tmp_path: Path, case: str) -> None:
    matrix, angle, apply = CASES[case]
    image = np.zeros((32, 64, 3), np.uint8)
    image[:16, :32, 0] = 255  # the left upper quarter is red
    image[16:, 32:, 2] = 255  # the right lower one blue
    path = turned(write(tmp_path / "a.mp4", even(2, 16), image), matrix)
    with av.open(str(path)) as container:
        assert abs(next(container.decode(video=0)).rotation) == abs(angle)
        assert angle == 180 or next(container.decode(video=0)).rotation == angle  # FFmpeg's own reading of the matrix
    seen = apply(image)
    clip = read_clip(path, size(1, *seen.shape[:2]))
    assert clip.shape == (3, 1, *seen.shape[:2])
    found = ((clip[:, 0] + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(found - seen).mean() < 3


def test_other_matrices_are_refused(tmp_path: Path) -> None:
    path = turned(write(tmp_path / "a.mp4", even(2, 16)), (1, 1, -1, 1))
    with pytest.raises(ValueError, match=r"a\.mp4: its display matrix .* is no quarter turn"):
        read_clip(path, size(1))


@pytest.mark.parametrize(
    ("pipeline", "transformer", "fps"),
    [
        ("WanPipeline", {"in_channels": 16}, 16),
        ("WanPipeline", {"in_channels": 48}, 24),
        ("CogVideoXPipeline", {"patch_size_t": None}, 8),
        ("CogVideoXPipeline", {"patch_size_t": 2}, 16),
    ],
)
def test_the_models_own_rate(tmp_path: Path, pipeline: str, transformer: dict[str, int | None], fps: float) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(transformer))
    assert frame_rate(tmp_path) == fps
    (tmp_path / "generation.json").write_text('{"fps": 12}')
    assert frame_rate(tmp_path) == 12
    for bad in ('"x"', "0", "true", "1e9", "NaN"):
        (tmp_path / "generation.json").write_text(f'{{"fps": {bad}}}')
        with pytest.raises(ValueError, match=r"generation\.json: fps = .* must be a number above 0, at most 1000"):
            frame_rate(tmp_path)


@pytest.mark.parametrize("fps", [None, 10])
def test_where_a_clip_begins(tmp_path: Path, fps: float | None) -> None:
    """40 frames in 4 seconds: a clip of 10 leaves 3, of which each of three clips has one to begin in."""
    path = write(tmp_path / "a.mp4", even(40, 10))

    def begins(place: Place) -> int:
        found = indices(read_clip(path, size(10), fps, place))
        assert found == list(range(found[0], found[0] + 10))
        return found[0]

    assert [begins(Place("first", number, 3)) for number in range(3)] == [0, 10, 20]
    assert [begins(Place("centre", number, 3)) for number in range(3)] == [5, 15, 25]
    assert begins(Place("centre")) == 15
    drawn = {seed: [begins(Place("random", number, 3, seed)) for number in range(3)] for seed in range(4)}
    assert all(0 <= a <= 10 <= b <= 20 <= c <= 30 for a, b, c in drawn.values())
    assert len(set(map(tuple, drawn.values()))) > 1 and begins(Place("random", 1, 3, 2)) == drawn[2][1]
    short = write(tmp_path / "b.mp4", even(10, 10))
    assert indices(read_clip(short, size(10), fps, Place("random"))) == list(range(10))  # nothing left over


def test_an_image_is_a_clip_of_one_frame(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.png"), "w") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 64, 3), 100, np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    for place in (Place(), Place("centre"), Place("random")):
        clip = read_clip(tmp_path / "a.png", size(1), 16, place)
        assert clip.shape == (3, 1, 32, 32) and torch.allclose(clip, torch.tensor(100 / 127.5 - 1))
