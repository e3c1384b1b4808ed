"""Codes, scales, zero points and sums of inputs: equal to fake quantization's bit for bit."""

import pytest
import torch

from qvgen.kernels.fused_ops import Norm
from qvgen.kernels.registry import Arguments, LayerTensors
from qvgen.kernels.triton import block_functions, launch
from qvgen.quant.primitives import codes, token_grid
from qvgen.quant.scheme import QuantArgs

CLIPS = 4


def layer(groups: int, seed: int, device: str) -> LayerTensors:
    """What the quantizer reads of a layer: its clips, and its groups by the scale's shape."""
    lower, upper = 0.3 + 0.7 * torch.rand(2, CLIPS, generator=torch.Generator().manual_seed(seed)).to(device)
    one = torch.ones(1, groups, device=device)
    return LayerTensors(one.to(torch.uint8), one, None, one.to(torch.int32), lower, upper, None)


def check(
    x: torch.Tensor,
    group: torch.Tensor,
    bits: int,
    symmetric: bool,
    groups: int = 1,
    layers: int = 1,
    norm: Norm | None = None,
) -> None:
    args = QuantArgs(num_bits=bits, symmetric=symmetric, strategy="token")
    tensors = [layer(groups, seed, str(x.device)) for seed in range(layers)]
    found = launch.quantize_tokens(x, tensors, Arguments(group, 4, bits, symmetric, "triton"), False, norm)
    x = x if norm is None else block_functions.layer_norm_modulate(x, *norm)  # another kernel: what it rounds to is x's dtype
    per_sample, centre = (-1, *[1] * (x.ndim - 1)), 2 ** (bits - 1)
    for one, result in zip(tensors, found, strict=True):
        assert one.clip_lower is not None and one.clip_upper is not None
        # On the CPU, which defines them: torch's division on a GPU is not that of IEEE in every build.
        x_fp32 = x.float().cpu()
        clips = (clip.cpu()[group.cpu()].view(per_sample) for clip in (one.clip_lower, one.clip_upper))
        scale, zero_point = token_grid(x_fp32, *clips, args)
        expected = codes(x_fp32, scale, zero_point, args).flatten(0, -2) - centre
        finite = scale.isfinite().flatten()
        k = x.shape[-1]
        written = result.codes[:, :k].float().cpu()
        assert torch.equal(result.scale.cpu().view(torch.int32)[finite], scale.flatten().view(torch.int32)[finite])
        assert result.scale.cpu()[~finite].isnan().all()
        assert torch.equal(written[finite], expected[finite])
        assert torch.equal(result.zero_point.cpu()[finite].float() + centre, zero_point.flatten()[finite])
        sums = written.view(len(written), groups, -1).sum(-1).to(torch.int32)
        assert torch.equal(result.sums.cpu(), sums)


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5).to(dtype)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width(bits: int, symmetric: bool, device: str) -> None:
    check(inputs(2, 5, 100).to(device), torch.tensor([1, 3], device=device), bits, symmetric)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_three_layers_share_a_read(dtype: torch.dtype, device: str) -> None:
    check(inputs(2, 3, 96, dtype=dtype).to(device), torch.tensor([2], device=device), 4, False, layers=3)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_a_layer_norm(dtype: torch.dtype, per_token: bool, device: str) -> None:
    x, parameters = inputs(2, 3, 96, dtype=dtype).to(device), inputs(2, 96, seed=1).to(device)
    scale, shift = (inputs(2, 3 if per_token else 1, 96, seed=seed).to(device) for seed in (2, 3))
    group = torch.tensor([2, 1], device=device)
    for norm in (
        Norm(None, None, scale, shift, 1e-6),
        Norm(*parameters, None, None, 1e-6),
        Norm(*parameters, scale, shift, 1e-6),
    ):
        check(x, group, 4, False, layers=3, norm=norm)


@pytest.mark.parametrize("groups", [3, 8])
def test_sums_of_groups(groups: int, device: str) -> None:
    check(inputs(1, 4, 24 * groups).to(device), torch.tensor([0], device=device), 4, False, groups=groups)


def test_ties_and_extremes(device: str) -> None:
    """Halves of a step, where x / s and x (1 / s) part; the smallest and largest numbers; constant and empty ranges."""
    halves = torch.arange(-64, 64).float() / 2
    rows = [halves, halves * 0.1, halves * 1e-38, halves * 1e36, torch.zeros(128), torch.full((128,), 5.0), -halves.abs()]
    x = torch.stack(rows).unsqueeze(0).to(device)
    for bits in (2, 4, 8):
        for symmetric in (False, True):
            check(x, torch.tensor([1], device=device), bits, symmetric)


def test_nan_and_infinity_stay_in_their_token(device: str) -> None:
    x = inputs(1, 5, 64)
    x[0, 1, 3], x[0, 2, 60], x[0, 3, 0] = float("nan"), float("inf"), float("-inf")
    check(x.to(device), torch.tensor([0], device=device), 4, False)


def test_any_strides(device: str) -> None:
    x = inputs(2, 6, 64).to(device)
    group = torch.tensor([0, 2], device=device)
    check(x[:, ::2], group, 4, False)
    check(inputs(2, 64, 6).to(device).transpose(1, 2), group, 4, False)
    check(inputs(2, 2, 3, 32).to(device), group, 4, False)
    check(inputs(2, 32).to(device), group, 4, False)


@pytest.mark.parametrize("group", [-1, CLIPS])
def test_a_timestep_group_without_clips_gives_nan(group: int, device: str) -> None:
    x = inputs(1, 2, 32).to(device)
    arguments = Arguments(torch.tensor([group], device=device), 4, 4, False, "triton")
    (result,) = launch.quantize_tokens(x, [layer(1, 0, device)], arguments, False)
    assert result.scale.isnan().all()


def test_e4m3_holds_four_bits_exactly(device: str) -> None:
    x, group = inputs(1, 7, 64).to(device), torch.tensor([1], device=device)
    for bits in (2, 3, 4):
        (whole,), (floats,) = (
            launch.quantize_tokens(x, [layer(1, 0, device)], Arguments(group, 4, bits, False, "triton"), e4m3)
            for e4m3 in (False, True)
        )
        assert torch.equal(floats.codes.float(), whole.codes.float())
