from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from qvgen.data.digits import ALL_ATTRIBUTES, sample_clips
from qvgen.evaluation.quality.similarity import psnr_db
from qvgen.sampling.video import SUFFIXES, contact_sheet, side_by_side, write_video

SCALE = 8  # 32 pixels are magnified to 256
CODED_PSNR_DB = 35.0  # what compression may cost at least


@pytest.fixture(scope="module")
def clip() -> torch.Tensor:
    return sample_clips([ALL_ATTRIBUTES[123]], torch.Generator().manual_seed(0))[0]


def decode(path: Path) -> tuple[torch.Tensor, float]:
    """Clip (3, t, h, w) in [-1, 1] and frames per second."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        rate = float(stream.average_rate or 0)
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1, rate


def shrink(clip: torch.Tensor) -> torch.Tensor:
    return clip[..., SCALE // 2 :: SCALE, SCALE // 2 :: SCALE]


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_written_video_reads_back(tmp_path: Path, clip: torch.Tensor, suffix: str) -> None:
    path = tmp_path / f"clip{suffix}"
    write_video(path, clip, fps=5)
    back, rate = decode(path)
    assert back.shape == (3, 9, 256, 256)
    assert rate == pytest.approx(5)
    assert psnr_db(clip[None], shrink(back)[None]).item() > CODED_PSNR_DB


def test_mp4_is_what_players_and_browsers_expect(tmp_path: Path, clip: torch.Tensor) -> None:
    write_video(tmp_path / "clip.mp4", clip)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert context.name == ("h264" if "libx264" in av.codecs_available else "mpeg4")
        assert context.pix_fmt == "yuv420p"
        assert "creation_time" not in container.metadata


def test_png_holds_the_frames_in_a_row(tmp_path: Path, clip: torch.Tensor) -> None:
    write_video(tmp_path / "clip.png", clip)
    picture = np.array(Image.open(tmp_path / "clip.png"))
    assert picture.shape == (64, 9 * 64 + 8 * 4, 3)
    last = torch.from_numpy(picture[::2, -64::2].copy()).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.allclose(last, clip[:, -1], atol=1 / 127)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_clip_gives_the_same_bytes(tmp_path: Path, clip: torch.Tensor, suffix: str) -> None:
    paths = [tmp_path / f"{name}{suffix}" for name in ("a", "b")]
    for path in paths:
        write_video(path, clip)
    other = tmp_path / f"other{suffix}"
    write_video(other, clip.flip(-1))
    assert paths[0].read_bytes() == paths[1].read_bytes() != other.read_bytes()


@pytest.mark.slow
def test_the_encoder_does_not_depend_on_what_was_in_memory(tmp_path: Path) -> None:
    """Clips of the embedded data that x264's macroblock tree encoded in two or three ways within a few dozen writes."""
    clips = sample_clips(list(ALL_ATTRIBUTES[:60]), torch.Generator().manual_seed(0))
    for i in (26, 28, 30):
        clip, found = side_by_side([clips[i], clips[i + 1]], ("full precision", "packed")), set[bytes]()
        for k in range(17):
            litter = torch.rand(50_000 * (k % 5 + 1))  # so that the encoder's buffers lie elsewhere
            write_video(tmp_path / "clip.mp4", clip)
            found.add((tmp_path / "clip.mp4").read_bytes())
            del litter
        assert len(found) == 1


def test_odd_sizes_and_single_frames(tmp_path: Path) -> None:
    write_video(tmp_path / "odd.mp4", torch.zeros(3, 1, 257, 301))
    back, _ = decode(tmp_path / "odd.mp4")
    assert back.shape == (3, 1, 258, 302)


def test_gif_keeps_the_duration_of_equal_frames(tmp_path: Path, clip: torch.Tensor) -> None:
    stopping = torch.cat([clip, clip[:, -1:].expand(-1, 3, -1, -1)], dim=1)
    write_video(tmp_path / "stopping.gif", stopping, fps=4)
    with Image.open(tmp_path / "stopping.gif") as picture:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(picture)]
    assert sum(durations) == 12 * 250


def test_unknown_suffix_lists_the_known_ones_and_writes_nothing(tmp_path: Path, clip: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"\.mp4, \.gif, \.png"):
        write_video(tmp_path / "clip.avi", clip)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path, clip: torch.Tensor, monkeypatch) -> None:
    path = tmp_path / "clip.gif"
    write_video(path, clip)
    before = path.read_bytes()

    def full_disk(self, fp, **_options) -> None:
        Path(fp).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_video(path, clip.flip(-1))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_shape_is_refused(tmp_path: Path, clip: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(3, t, h, w\)"):
        write_video(tmp_path / "clip.mp4", clip[None])


def test_side_by_side_keeps_both_clips_and_labels_them(clip: torch.Tensor) -> None:
    joined = side_by_side([clip, -clip], ["left", "right"])
    assert joined.shape[:2] == (3, 9) and joined.shape[3] == 2 * 256 + 4
    left, right = joined[:, :, -256:, :256], joined[:, :, -256:, -256:]
    assert torch.allclose(shrink(left), clip, atol=1 / 127) and torch.allclose(shrink(right), -clip, atol=1 / 127)
    assert joined[:, :, :-256].min() < 0  # the label is written in black
    with pytest.raises(ValueError, match="one label per clip"):
        side_by_side([clip], [])


def test_contact_sheet_shows_every_row(tmp_path: Path, clip: torch.Tensor) -> None:
    contact_sheet(tmp_path / "one.png", [[clip, -clip]], ["a"], ["left", "right"])
    contact_sheet(tmp_path / "two.png", [[clip, -clip], [-clip, clip]], ["a", "b"], ["left", "right"])
    one, two = (np.array(Image.open(tmp_path / f"{name}.png")) for name in ("one", "two"))
    assert two.shape[1] == one.shape[1] and two.shape[0] > one.shape[0] + 64
    assert (two[: one.shape[0]] == one).all()
    with pytest.raises(ValueError, match=r"must end in \.png"):
        contact_sheet(tmp_path / "sheet.mp4", [[clip]], ["a"])


def test_contact_sheet_thins_long_clips(tmp_path: Path) -> None:
    contact_sheet(tmp_path / "long.png", [[torch.zeros(3, 81, 64, 64)]], ["long"])
    assert Image.open(tmp_path / "long.png").width == 9 * 64 + 8 * 4
