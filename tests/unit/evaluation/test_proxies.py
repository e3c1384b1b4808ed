"""The proxies on clips whose motion is known."""

import json
import sys

import numpy as np
import pytest
import torch

from pipelines import cli
from qvgen.evaluation.quality import proxies
from qvgen.sampling.video import write_video

SIZE, FRAMES, FPS = 128, 16, 8.0
FAST = 6 * SIZE / 256  # pixels per frame: VBench's threshold at this size


def textured(height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """A smooth random picture (h, w, 3) uint8: flow needs something to hold on to."""
    import cv2

    noise = np.random.default_rng(0).uniform(0, 255, (height // 4, width // 4, 3)).astype(np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def moving_square(speed: float, frames: int = FRAMES) -> np.ndarray:
    """A textured square of 48 pixels, more than 5 % of the picture, over a still background."""
    background, square = textured() // 3, textured(48, 48)
    clip = np.repeat(background[None], frames, axis=0)
    for t in range(frames):
        x = round(speed * t) % (SIZE - 48)
        clip[t, 40:88, x : x + 48] = square
    return clip


def pan(speed: int, frames: int = FRAMES) -> np.ndarray:
    picture = textured(SIZE, SIZE + speed * frames)
    return np.stack([picture[:, speed * t : speed * t + SIZE] for t in range(frames)])


def flicker(frames: int = FRAMES) -> np.ndarray:
    picture = textured()
    return np.stack([picture // (1 + 2 * (t % 2)) for t in range(frames)])


def frozen(frames: int = FRAMES) -> np.ndarray:
    return np.repeat(textured()[None], frames, axis=0)


@pytest.mark.parametrize(("speed", "moves"), [(0, 0.0), (1, 0.0), (2, 0.0), (5, 1.0), (7, 1.0)])
def test_a_square_moves_or_not(speed: int, moves: float) -> None:
    assert (speed > FAST) == bool(moves)
    assert proxies.proxy_flow_dynamic_degree(moving_square(speed), FPS) == moves


def test_the_flow_is_the_motion() -> None:
    flow = proxies._flow(*pan(3, 2))
    assert np.allclose(np.median(flow, axis=(0, 1)), (-3, 0), atol=0.1)


def test_frames_are_thinned_to_eight_a_second() -> None:
    """2 pixels per frame are slow at 8 frames per second, and 6 pixels per frame looked at when the file has 24."""
    slow = moving_square(2, frames=36)
    assert proxies.proxy_flow_dynamic_degree(slow, 8.0) == 0.0
    assert proxies.proxy_flow_dynamic_degree(slow, 24.0) == 1.0


def test_a_quarter_of_the_frames_must_move() -> None:
    """16 frames need 4 moving pairs."""
    moving, still = moving_square(6), frozen()
    for pairs, moves in ((3, 0.0), (4, 1.0)):
        clip = np.concatenate([moving[: pairs + 1], np.repeat(moving[pairs][None], FRAMES - pairs - 1, axis=0)])
        assert proxies.proxy_flow_dynamic_degree(clip, FPS) == moves
    assert proxies.proxy_flow_dynamic_degree(still[:2], FPS) == 0.0


def test_steady_motion_is_smooth_and_flicker_is_not() -> None:
    steady, jumping = proxies.proxy_warp_smoothness(pan(4)), proxies.proxy_warp_smoothness(flicker())
    unordered = proxies.proxy_warp_smoothness(pan(4)[np.random.default_rng(1).permutation(FRAMES)])
    assert proxies.proxy_warp_smoothness(frozen()) == 1.0
    assert steady > 0.98
    assert jumping < unordered < steady
    mean = textured().mean() / 255
    assert jumping == pytest.approx(1 - mean * 2 / 3, abs=0.01)  # odd frames have a third of the brightness


def test_the_warp_is_better_than_the_mean_of_the_neighbours() -> None:
    clip = pan(4).astype(np.float32)
    mean = 1 - np.abs((clip[0:-2:2] + clip[2::2]) / 2 - clip[1:-1:2]).mean() / 255
    assert 1 - proxies.proxy_warp_smoothness(pan(4)) < (1 - mean) / 4


def test_consistency() -> None:
    still, panned = proxies.proxy_frame_consistency(frozen()), proxies.proxy_frame_consistency(pan(8))
    cut = np.concatenate([frozen(8), 255 - frozen(8)])
    assert still == pytest.approx(1.0, abs=1e-6)
    assert panned < 0.9
    assert proxies.proxy_frame_consistency(cut) == pytest.approx((7 + 7 * 0.5) / 15, abs=0.01)  # 7 like both, 7 like the last
    assert proxies.proxy_frame_consistency(np.zeros((4, 32, 32, 3), np.uint8)) == 1.0
    assert proxies.proxy_frame_consistency(np.stack([frozen(1)[0], np.zeros((SIZE, SIZE, 3), np.uint8)])) == 0.0


def test_a_frozen_video_wins_everything_but_motion() -> None:
    still, moving = proxies.scores(frozen(), FPS), proxies.scores(pan(6), FPS)
    assert list(still) == list(moving) and {"motion", "flicker"} < still.keys()
    for name in ("proxy_warp_smoothness", "proxy_frame_consistency"):
        assert still[name] > moving[name]
    assert still["motion"] == still["proxy_flow_dynamic_degree"] == 0.0
    assert moving["motion"] > 0.01 and moving["proxy_flow_dynamic_degree"] == 1.0


@pytest.mark.parametrize("frames", [1, 2])
def test_short_videos(frames: int) -> None:
    assert list(proxies.scores(frozen(frames), FPS).values()) == pytest.approx([0, 0, 0, 1, 1], abs=1e-12)


def clip_of(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["qvgen", "proxies", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_the_command(monkeypatch, capsys, tmp_path) -> None:
    write_video(tmp_path / "still-0.mp4", clip_of(frozen()), fps=8)
    write_video(tmp_path / "pan-0.mp4", clip_of(pan(6)), fps=8)
    assert run(monkeypatch, "--videos", str(tmp_path), "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["videos"]["still-0.mp4"]["proxy_flow_dynamic_degree"] == 0.0
    assert content["videos"]["pan-0.mp4"]["proxy_flow_dynamic_degree"] == 1.0
    assert content["mean"]["proxy_flow_dynamic_degree"] == 0.5
    assert run(monkeypatch, "--videos", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert shown.index("motion") < shown.index("proxy_frame_consistency") and "no VBench scores" in shown


def test_files_that_are_no_videos(monkeypatch, capsys, tmp_path) -> None:
    assert run(monkeypatch, "--videos", str(tmp_path)) == 1
    assert "has no .mp4 files" in capsys.readouterr().err
    (tmp_path / "a-0.mp4").write_bytes(b"nothing")
    assert run(monkeypatch, "--videos", str(tmp_path)) == 1
    assert "a-0.mp4 cannot be read" in capsys.readouterr().err
