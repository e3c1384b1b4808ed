"""The ops between linear layers, against the PyTorch expressions that define them."""

import pytest
import torch

from qvgen.kernels import block_ops
from qvgen.kernels.expressions import EXPRESSIONS
from qvgen.kernels.triton import block_functions

FLOAT32 = 2e-5  # sums in another order, up to six operations on values of about 1
SPACING = {torch.float32: FLOAT32, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = list(SPACING)


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(name: str, device: str, *arguments: object) -> None:
    moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QVGEN_KERNELS", "triton")
        op = block_functions.BLOCK_OPS[name]
        assert op.takes(*moved)
        patch.setitem(vars(block_functions), "_missing", lambda: "")
        result = op.run(*moved)
    expected = EXPRESSIONS[name](*arguments)
    assert result.dtype == expected.dtype and result.shape == expected.shape
    difference = (result.cpu().double() - expected.double()).abs()
    assert (difference <= SPACING[expected.dtype] * expected.double().abs().clamp(min=1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 33, 1536])
@pytest.mark.parametrize("per_token", [False, True])
def test_layer_norm_modulate(features: int, per_token: bool, dtype: torch.dtype, device: str) -> None:
    x = 3 * rand(2, 4, features, dtype=dtype) + 1
    scale, shift = (rand(2, 4 if per_token else 1, features, seed=s) for s in (1, 2))
    weight, bias = rand(features, seed=3), rand(features, seed=4, dtype=dtype)
    for parameters in [(None, None, scale, shift), (weight, bias, None, None), (weight, bias, scale, shift), (None,) * 4]:
        check("layer_norm_modulate", device, x, *parameters, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size"), [(1, 16), (3, 32), (12, 128), (2, 10)])
def test_rms_norm_rotary(heads: int, size: int, dtype: torch.dtype, device: str) -> None:
    x, weight = rand(2, 5, heads * size, dtype=dtype), rand(heads * size, seed=1, dtype=dtype)
    angle = rand(1, 5, 1, size // 2, seed=2).repeat_interleave(2, -1)
    for parameters in [(weight, angle.cos(), angle.sin()), (None, angle.cos(), angle.sin()), (weight, None, None)]:
        check("rms_norm_rotary", device, x, *parameters, heads, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [1, 31, 64])
def test_add_gated(features: int, dtype: torch.dtype, device: str) -> None:
    x, y = (rand(2, 6, features, seed=s, dtype=dtype) for s in (0, 1))
    for gate in (None, rand(2, 1, features, seed=2), rand(2, 6, features, seed=2)):
        check("add_gated", device, x, y, gate)
    check("add_gated", device, x.transpose(1, 2), y.transpose(1, 2), None)


def test_the_registry_runs_them(device: str) -> None:
    x = rand(2, 3, 8).to(device)
    assert torch.equal(block_ops.add_gated(x, x, None), 2 * x)
