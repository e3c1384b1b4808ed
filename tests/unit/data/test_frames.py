"""Videos as players show them: by the times of their frames, and upright."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from qvgen.data.videos import read_clip
from qvgen.models.family import ClipSize

SIZE = ClipSize(frames=9, height=32, width=32, max_sequence_length=4)
NEAR = 0.03  # lossy codecs, of a range of 2
SPEED = 100  # grey levels per second


def write_video(
    path: Path, times: Sequence[Fraction], codec: str = "libx264", base: Fraction = Fraction(1, 90_000), height: int = 32
) -> Path:
    """Grey frames that say their own time; `base`: the tick of the times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 32, height, "yuv420p", base
        stream.codec_context.time_base = base
        for time in times:
            grey = np.full((height, 32, 3), round(float(time) * SPEED) % 256, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = round(time / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def steady(fps: Fraction | int, seconds: float) -> list[Fraction]:
    return [Fraction(i) / fps for i in range(int(seconds * fps))]


def shown_times(clip: torch.Tensor) -> torch.Tensor:
    """Seconds that the frames of a clip show."""
    return (clip.mean(dim=(0, 2, 3)) + 1) * 127.5 / SPEED


@pytest.mark.parametrize("rate", [60, 30, Fraction(24_000, 1001), 16])
def test_the_same_motion_at_any_rate(tmp_path: Path, rate: Fraction | int) -> None:
    clip = read_clip(write_video(tmp_path / "v.mp4", steady(rate, 1)), SIZE, fps=16)
    wanted = torch.arange(9) / 16
    late = wanted - shown_times(clip)
    assert (late > -NEAR).all() and (late < 1 / float(rate) + NEAR).all()  # the newest frame that is not in the future
    if rate == 16:
        assert torch.equal(clip, read_clip(tmp_path / "v.mp4", SIZE))


def test_uneven_times_count_as_they_are(tmp_path: Path) -> None:
    times = [Fraction(ms, 1000) for ms in (0, 10, 20, 130, 140, 255, 380, 381, 500, 640, 750, 760, 880, 1000, 1010)]
    clip = read_clip(write_video(tmp_path / "v.mp4", times), SIZE, fps=8)
    newest = [max(time for time in times if time <= Fraction(i, 8)) for i in range(9)]
    torch.testing.assert_close(shown_times(clip), torch.tensor([float(time) for time in newest]), atol=NEAR, rtol=0)


def test_times_in_whole_milliseconds_lose_no_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.webm", steady(16, 1), codec="libvpx-vp9", base=Fraction(1, 1000))
    assert torch.equal(read_clip(path, SIZE, fps=16), read_clip(path, SIZE))


def test_a_video_that_is_too_short_or_too_slow_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", steady(30, 0.5))
    with pytest.raises(ValueError, match=r"lasts 0\.50 s, too short for 9 frames at 16 frames per second \(0\.56 s\)"):
        read_clip(path, SIZE, fps=16)
    assert read_clip(path, SIZE, fps=18).shape == (3, 9, 32, 32)
    path = write_video(tmp_path / "w.mp4", steady(8, 2))
    with pytest.raises(ValueError, match="shows 5 frames in the time of 9 at 16 frames per second: motion would stutter"):
        read_clip(path, SIZE, fps=16)


# Of the display matrix, in units of 1 / 65536: x' = a x + c y, y' = b x + d y with y downwards.
@pytest.mark.parametrize(
    ("matrix", "quarter_turns_left"),
    [((1, 0, 0, 1), 0), ((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)],
)
def test_clips_are_upright(tmp_path: Path, matrix: tuple[int, int, int, int], quarter_turns_left: int) -> None:
    path = tmp_path / "v.mp4"
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    picture[:16] = 200  # light above, as it is stored
    picture[:16, :16] = 100
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # of the matrix in a header of version 0
    for place, value in zip((0, 4, 12, 16), matrix, strict=True):  # a, b, c, d; u, v, w, x, y stay
        data[at + place : at + place + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    clip = read_clip(path, SIZE)
    wanted = torch.from_numpy(np.rot90(picture, quarter_turns_left).copy()).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(clip[:, 0], wanted, atol=NEAR, rtol=0)
