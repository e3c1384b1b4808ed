"""What the cpu backend cannot run gives an error that says why, and never a crash."""

import copy
import gc
import struct
from typing import Any

import numpy as np
import pytest
import torch

from qvgen.kernels import checked
from qvgen.kernels.cpu.backend import CpuBackend
from qvgen.kernels.linear_ops import quantized_linear
from qvgen.kernels.registry import KernelPreference, choose
from qvgen.nn.layers_together import linears
from qvgen.nn.packed_linear import PackedLinear
from qvgen.nn.timestep import set_timestep
from qvgen.quant.scheme import QuantArgs
from tests.support.cpu_weights import stored_weight
from tests.support.packed_reference import GROUPS, build, scheme_of

NOT_A_WEIGHT = "the weight is not in this backend's layout, or of another shape"
X = torch.ones(2, 3, 32)


@pytest.fixture
def layer() -> PackedLinear:
    layer, _ = build(scheme_of(QuantArgs(), 4, 4, symmetric=False), 70, 32)
    layer.prepare_backend(KernelPreference.CPU)
    set_timestep(torch.tensor([0.0, 999.0]))
    return layer


@pytest.mark.parametrize("group", [[-1], [GROUPS], [0, GROUPS], [2**40, 0]], ids=str)
def test_a_timestep_group_without_clips(layer: PackedLinear, group: list[int]) -> None:
    arguments = layer._arguments(X)._replace(timestep_group=torch.tensor(group))
    with pytest.raises(RuntimeError, match="a timestep group has no clips"):
        quantized_linear(X, *layer._tensors(), *arguments, False, None)


def test_timestep_groups_for_other_samples(layer: PackedLinear) -> None:
    for wrong in ([0, 1, 2], []):
        arguments = layer._arguments(X)._replace(timestep_group=torch.tensor(wrong, dtype=torch.int64))
        with pytest.raises(ValueError, match=f"{len(wrong)} timestep groups were given for an input of 2 samples"):
            quantized_linear(X, *layer._tensors(), *arguments, False, None)


def test_too_long_sums() -> None:
    most = (2**31 - 1) // 255**2
    eight = stored_weight(np.zeros((1, 8)), 8)
    assert CpuBackend().supports(eight._replace(in_features=most)) == ""
    reason = f"in_features {most + 1} is more than {most}"
    assert CpuBackend().supports(eight._replace(in_features=most + 1)) == reason
    with pytest.raises(RuntimeError, match=f"'cpu' was asked for and cannot run: {reason}"):
        choose(eight._replace(in_features=most + 1), KernelPreference.CPU)


def test_too_many_layers() -> None:
    layers = []
    for seed in range(9):
        one, _ = build(scheme_of(QuantArgs(), 4, 4, symmetric=False), 5, 32, seed)
        one.prepare_backend(KernelPreference.CPU)
        set_timestep(torch.tensor([0.0]))
        layers.append(one)
    with pytest.raises(RuntimeError, match="too many layers share one input"):
        linears(X, layers)


def test_a_weight_of_another_shape(layer: PackedLinear) -> None:
    tensors, arguments = layer._tensors(), layer._arguments(X)
    with pytest.raises(RuntimeError, match=NOT_A_WEIGHT):
        quantized_linear(X[..., :31], *tensors, *arguments, False, None)
    with pytest.raises(RuntimeError, match=NOT_A_WEIGHT):
        grown = torch.ones(71, 1), torch.ones(71, 1), torch.ones(71, 1, dtype=torch.int32)
        quantized_linear(X, tensors.weight, *grown, *tensors[4:6], None, *arguments, False, None)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("clip_upper", torch.ones(GROUPS - 1), "clip_lower and clip_upper must be float32"),
        ("clip_upper", torch.ones(GROUPS, dtype=torch.float64), "clip_lower and clip_upper must be float32"),
        ("clip_upper", None, "clip_lower and clip_upper are missing"),
        ("bias", torch.ones(69), r"bias must be \(70,\) of any float"),
        ("bias", torch.ones(70, dtype=torch.int64), r"bias must be \(70,\) of any float"),
        ("weight_zero_point", torch.ones(69, 1), "weight_zero_point must be float32"),
        ("weight_row_sum", torch.ones(70, 1), "weight_row_sum must be int32"),
        ("weight_scale", torch.ones(70), "weight_scale must be float32 of shape"),
    ],
)
def test_a_tensor_that_does_not_fit(layer: PackedLinear, field: str, value: torch.Tensor | None, message: str) -> None:
    tensors = layer._tensors()._replace(**{field: value})
    with pytest.raises(ValueError, match=message):
        quantized_linear(X, *tensors, *layer._arguments(X), False, None)


@pytest.mark.parametrize("field", ["weight", "weight_scale", "clip_lower", "bias", "timestep_group"])
def test_a_tensor_on_another_device_or_sparse(layer: PackedLinear, field: str) -> None:
    for change in (lambda t: torch.empty_like(t, device="meta"), lambda t: t.to_sparse()):
        tensors, arguments = layer._tensors(), layer._arguments(X)
        if field in tensors._fields:
            tensors = tensors._replace(**{field: change(getattr(tensors, field).detach())})
        else:
            arguments = arguments._replace(timestep_group=change(arguments.timestep_group))
        with pytest.raises((ValueError, RuntimeError)):  # torch itself refuses some mixtures of devices
            quantized_linear(X, *tensors, *arguments, False, None)


@pytest.mark.parametrize(
    "new", [torch.ones(69), torch.ones(71), torch.ones(70, dtype=torch.int64), "its own, one less"], ids=str
)
def test_a_layer_that_was_right_is_looked_at_again_where_its_tensors_change(layer: PackedLinear, new: Any) -> None:
    with torch.no_grad():
        expected = layer(X)
        assert torch.equal(layer(X), expected)
        bias = layer.bias
        assert bias is not None
        right = bias.data
        bias.data = right[:69] if isinstance(new, str) else new  # the same object, as casting a module leaves it
        with pytest.raises(ValueError, match=r"bias must be \(70,\) of any float"):
            layer(X)
        bias.data = right
        assert torch.equal(layer(X), expected)


def test_a_bias_that_is_cast_and_cast_again(layer: PackedLinear) -> None:
    """Its memory may come to lie where it was before, in another dtype."""
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float32) * 5:
            layer.to(dtype)
            fresh = copy.deepcopy(layer)
            fresh.prepare_backend(KernelPreference.CPU)
            assert torch.equal(layer(X), fresh(X)), dtype


def test_what_is_known_of_a_layer_goes_with_it() -> None:
    made, _ = build(scheme_of(QuantArgs(), 4, 4, symmetric=False), 5, 32)
    key = id(made.prepare_backend(KernelPreference.CPU).weight)
    set_timestep(torch.tensor([0.0]))
    made(X)
    assert key in checked._known
    del made
    gc.collect()
    assert key not in checked._known


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_bits_that_there_are_not(layer: PackedLinear, bits: int) -> None:
    arguments = layer._arguments(X)
    with pytest.raises(ValueError, match=f"activation_bits must be 2 to 8, or None for floating point, not {bits}"):
        quantized_linear(X, *layer._tensors(), *arguments._replace(activation_bits=bits), False, None)
    with pytest.raises(ValueError, match=f"weight_bits must be 2 to 8, not {bits}"):
        quantized_linear(X, *layer._tensors(), *arguments._replace(weight_bits=bits), False, None)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn, torch.float64])
def test_inputs_that_would_lose_something(layer: PackedLinear, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="input must be float32, bfloat16 or float16"):
        layer(X.to(dtype))


def test_an_output_of_float16(layer: PackedLinear) -> None:
    with pytest.raises(ValueError, match="out must be float32 or bfloat16, not"):
        layer.forward_into(X, torch.empty(*X.shape[:-1], 70, dtype=torch.float16))


# Fields of layout.h's Header.
MAGIC, WEIGHT_BITS, LANE_BITS, N, K, GROUPS_ALONG_K = (0, "q"), (8, "i"), (12, "i"), (16, "q"), (24, "q"), (32, "q")
TAMPERED = [
    (MAGIC, 0),
    *[(field, value) for field, old in ((N, 70), (K, 32), (GROUPS_ALONG_K, 1)) for value in (old + 1, 0, -old)],
    *[(WEIGHT_BITS, value) for value in (3, 5, 9, -1)],
    *[(LANE_BITS, value) for value in (8, 3, 0)],
    *[(field, 2**62) for field in (N, K, GROUPS_ALONG_K)],
]


def tamper(weight: torch.Tensor, field: tuple[int, str], value: int) -> None:
    at, kind = field
    new = struct.pack(f"<{kind}", value)
    weight[at : at + len(new)] = torch.tensor(list(new), dtype=torch.uint8)


@pytest.mark.parametrize(("field", "value"), TAMPERED)
def test_a_tampered_header_does_not_run(isa: str, layer: PackedLinear, field: tuple[int, str], value: int) -> None:
    weight, expected = layer._tensors().weight, layer(X)
    whole = weight.clone()
    tamper(weight, field, value)
    with pytest.raises(RuntimeError, match=NOT_A_WEIGHT):
        layer(X)
    weight.copy_(whole)
    assert torch.equal(layer(X), expected)


@pytest.mark.parametrize(("field", "value"), TAMPERED)
def test_a_tampered_header_does_not_unpack(layer: PackedLinear, field: tuple[int, str], value: int) -> None:
    tamper(layer._tensors().weight, field, value)
    with pytest.raises(RuntimeError, match=NOT_A_WEIGHT):
        layer.state_dict()
