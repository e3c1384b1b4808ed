import math

import pytest
import torch

from qvgen.data.digits import ALL_ATTRIBUTES, sample_clips
from qvgen.evaluation.quality.motion import flicker, motion
from qvgen.evaluation.quality.similarity import MAX_PSNR_DB, mse, psnr_db, ssim


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    return sample_clips(list(ALL_ATTRIBUTES[::100]), torch.Generator().manual_seed(0))


def test_mse_and_psnr_of_a_known_error() -> None:
    black = torch.full((2, 3, 4, 16, 16), -1.0)
    other = black.clone()
    other[1] += 0.2  # a tenth of the peak-to-peak range: 20 dB
    assert mse(black, other).tolist() == pytest.approx([0.0, 0.04])
    assert psnr_db(black, other).tolist() == pytest.approx([MAX_PSNR_DB, 20.0], abs=1e-4)


def test_psnr_is_the_same_on_zero_to_one_scale_by_the_textbook_formula(clips: torch.Tensor) -> None:
    noisy = (clips + 0.1 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    a, b = (clips[0] + 1) / 2, (noisy[0] + 1) / 2
    assert psnr_db(clips, noisy)[0].item() == pytest.approx(-10 * math.log10((a - b).square().mean()), abs=1e-3)


def test_ssim_ranks_identical_above_noisy_above_another_clip(clips: torch.Tensor) -> None:
    noisy = (clips + 0.1 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    same, near, far = ssim(clips, clips), ssim(clips, noisy), ssim(clips, clips.flip(-1))
    assert same.tolist() == pytest.approx([1.0] * len(clips))
    assert (near < 0.95).all() and (far < same).all()
    assert same.shape == (len(clips),)


def test_ssim_sees_lost_contrast_that_keeps_the_mean() -> None:
    stripes = torch.ones(1, 3, 2, 32, 32)
    stripes[..., ::2] = -1
    assert ssim(stripes, torch.zeros_like(stripes)).item() < 0.05


def test_shapes_that_do_not_match_are_refused(clips: torch.Tensor) -> None:
    for measure in (mse, psnr_db, ssim):
        with pytest.raises(ValueError, match="cannot compare shapes"):
            measure(clips, clips[:, :, :-1])
    with pytest.raises(ValueError, match="11x11"):
        ssim(clips[..., :8, :8], clips[..., :8, :8])


def test_motion_of_a_frozen_a_steady_and_a_flickering_clip() -> None:
    frozen = torch.zeros(1, 3, 5, 8, 8)
    steady = frozen + torch.linspace(-1, 1, 5).view(1, 1, 5, 1, 1)  # 0.5 of 2 per frame
    blinking = frozen - 1
    blinking[:, :, 1::2] = 1
    assert motion(frozen).item() == 0 and flicker(frozen).item() == 0
    assert motion(steady).item() == pytest.approx(0.25) and flicker(steady).item() == pytest.approx(0)
    assert motion(blinking).item() == pytest.approx(1) and flicker(blinking).item() == pytest.approx(2)


def test_clips_too_short_to_move() -> None:
    one = torch.rand(2, 3, 1, 8, 8)
    assert motion(one).tolist() == [0, 0] and flicker(one).tolist() == [0, 0]
