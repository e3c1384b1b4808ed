from typing import Any

import pytest
import torch

from qvgen.packing.bits import pack
from qvgen.packing.layout import layer_layout, packed_bytes, row_sums, validate_layer
from qvgen.quant.scheme import QuantArgs, QuantScheme

N, K = 6, 32
SYMMETRIC = QuantScheme(weights=QuantArgs(symmetric=True), timestep_groups=3)
GROUPS = QuantScheme(weights=QuantArgs(num_bits=3, strategy="group", group_size=16), timestep_groups=3)
TENSOR = QuantScheme(weights=QuantArgs(strategy="tensor"), timestep_groups=3)
WEIGHT_ONLY = QuantScheme(weights=QuantArgs(), input_activations=None)
EXTRAS = QuantScheme(timestep_groups=3, input_scaling=True, input_rotation=16, low_rank=2)
SCHEMES = [QuantScheme(timestep_groups=3), SYMMETRIC, GROUPS, TENSOR, WEIGHT_ONLY, EXTRAS]


def layer(scheme: QuantScheme, has_bias: bool = True) -> dict[str, torch.Tensor]:
    """A valid packed layer."""
    generator = torch.Generator().manual_seed(0)
    args = scheme.weights
    codes = torch.randint(0, args.max_code + 1, (N, K), dtype=torch.uint8, generator=generator)
    tensors = {}
    for name, spec in layer_layout(K, N, scheme, has_bias).items():
        tensors[name] = torch.ones(spec.shape, dtype=spec.dtype)
    tensors["weight_packed"] = pack(codes, args.num_bits)
    tensors["weight_row_sum"] = row_sums(codes, K // (args.group_size or K))
    tensors["weight_shape"] = torch.tensor([N, K])
    return tensors


def validate(tensors: dict[str, torch.Tensor], scheme: QuantScheme, has_bias: bool = True, **changed: Any) -> None:
    validate_layer("blocks.0.q", tensors, K, N, scheme, has_bias, **changed)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_whole_layer_is_valid_and_has_the_stated_size(scheme: QuantScheme, has_bias: bool) -> None:
    tensors = layer(scheme, has_bias)
    validate(tensors, scheme, has_bias)
    assert packed_bytes(K, N, scheme, has_bias) == sum(t.nbytes for t in tensors.values())


def test_which_tensors_a_scheme_has() -> None:
    assert "weight_zero_point" not in layer(SYMMETRIC)
    assert not any(name.startswith("input_clip") for name in layer(WEIGHT_ONLY))
    assert layer(GROUPS)["weight_scale"].shape == layer(GROUPS)["weight_row_sum"].shape == (N, 2)
    assert layer(TENSOR)["weight_scale"].shape == (1, 1)


def test_size_of_a_known_layer() -> None:
    # 4 bits x 1536 x 8960, scale + zero point + row sum, shape, 2 x 50 clips, bf16 bias
    assert packed_bytes(1536, 8960, QuantScheme(), has_bias=True) == 1536 * 8960 // 2 + 12 * 8960 + 16 + 400 + 2 * 8960


def changed(name: str, value: torch.Tensor | None, scheme: QuantScheme = SCHEMES[0]) -> dict[str, torch.Tensor]:
    tensors = layer(scheme)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    return tensors


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("weight_scale", None, r"layer blocks.0.q: weight_scale missing"),
        ("weight_g_idx", torch.ones(1), r"layer blocks.0.q: weight_g_idx not expected"),
        ("weight_scale", torch.ones(N, 2), r"blocks.0.q.weight_scale: expected \[6, 1\] torch.float32, found \[6, 2\]"),
        ("weight_scale", torch.ones(N, 1, dtype=torch.bfloat16), r"blocks.0.q.weight_scale: .*found \[6, 1\] torch.bfloat16"),
        ("weight_scale", torch.full((N, 1), torch.nan), r"blocks.0.q.weight_scale: holds NaN or Inf"),
        ("weight_scale", torch.zeros(N, 1), r"blocks.0.q.weight_scale: scales must be positive"),
        ("weight_zero_point", torch.full((N, 1), torch.inf), r"blocks.0.q.weight_zero_point: holds NaN or Inf"),
        ("weight_packed", torch.zeros(N, 4, dtype=torch.int32), r"blocks.0.q.weight_packed: the codes do not add up"),
        ("weight_row_sum", torch.zeros(N, 1, dtype=torch.int32), r"do not add up to weight_row_sum"),
        ("weight_shape", torch.tensor([N, K + 1]), r"blocks.0.q.weight_shape: expected \[6, 32\], found \[6, 33\]"),
        ("input_clip_upper", torch.full((3,), 1.5), r"blocks.0.q.input_clip_upper: clips must lie in \(0, 1\]"),
        ("input_clip_lower", torch.tensor([1.0, 0.0, 1.0]), r"blocks.0.q.input_clip_lower: clips must lie in \(0, 1\]"),
        ("weight_zero_point", torch.full((N, 1), 1e30), r"blocks.0.q.weight_zero_point: 1e\+30 is beyond 16777216"),
        ("weight_zero_point", torch.full((N, 1), -1e8), r"blocks.0.q.weight_zero_point: 1e\+08 is beyond 16777216"),
        ("weight_scale", torch.full((N, 1), 1e35), r"blocks.0.q.weight_scale: makes values up to 1.4e\+36, beyond 1.84e\+19"),
        ("weight_scale", torch.full((N, 1), 2e18), r"blocks.0.q.weight_scale: makes values up to 2.8e\+19"),
        ("input_clip_upper", torch.ones(4), r"blocks.0.q.input_clip_upper: expected \[3\]"),
        ("bias", torch.ones(N, dtype=torch.int32), r"blocks.0.q.bias: expected \[6\]"),
        ("bias", torch.full((N,), -torch.inf), r"blocks.0.q.bias: holds NaN or Inf"),
    ],
)
def test_names_what_is_wrong(name: str, value: torch.Tensor | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        validate(changed(name, value), SCHEMES[0])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("input_scale", None, "packed layer blocks.0.q: input_scale missing"),
        ("low_rank_up", None, "packed layer blocks.0.q: low_rank_up missing"),
        ("low_rank_down", torch.ones(2, K), r"blocks.0.q.low_rank_down: expected \[1, 32\]"),
        ("low_rank_up", torch.ones(N, 1, dtype=torch.int32), r"blocks.0.q.low_rank_up: expected \[6, 1\]"),
        ("low_rank_up", torch.full((N, 1), torch.nan), "blocks.0.q.low_rank_up: holds NaN or Inf"),
        ("input_scale", torch.ones(K).bfloat16(), r"blocks.0.q.input_scale: expected \[32\] torch.float32, found"),
        ("input_scale", torch.full((K,), 1e35), r"blocks.0.q.input_scale: makes values up to 1e\+35"),
        ("input_scale", torch.zeros(K), "blocks.0.q.input_scale: scales must be positive"),
        ("input_scale", torch.full((K,), torch.inf), "blocks.0.q.input_scale: holds NaN or Inf"),
    ],
)
def test_names_what_is_wrong_with_extras(name: str, value: torch.Tensor | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        validate(changed(name, value, EXTRAS), EXTRAS)


def test_extras_belong_to_schemes_that_have_them() -> None:
    with pytest.raises(ValueError, match="input_scale, low_rank_down, low_rank_up not expected"):
        validate(layer(EXTRAS), SCHEMES[0])
    with pytest.raises(ValueError, match="in_features 32 is not a multiple of input_rotation 64"):
        layer_layout(K, N, QuantScheme(input_rotation=64), has_bias=False)


def test_factors_may_be_of_any_float_and_count_as_the_models_dtype() -> None:
    tensors = layer(EXTRAS)
    for name in ("bias", "low_rank_up", "low_rank_down"):
        tensors[name] = tensors[name].float()
    validate(tensors, EXTRAS)
    assert packed_bytes(K, N, EXTRAS, True, dtype_bytes=4) == sum(t.nbytes for t in tensors.values())


def test_values_that_training_can_reach_are_valid() -> None:
    """The smallest scale that a quantizer is clamped to, zero points outside the codes, clips down to 1e-30."""
    tensors = changed("weight_scale", torch.full((N, 1), torch.finfo(torch.float32).tiny))
    tensors["weight_zero_point"] = torch.linspace(-200.0, 200.0, N)[:, None]
    tensors["input_clip_lower"] = torch.tensor([1e-30, 0.95, 1.0])
    validate(tensors, SCHEMES[0])
    validate(changed("weight_scale", torch.full((N, 1), 65504.0)), SCHEMES[0])  # float16's largest


def test_finds_one_flipped_bit() -> None:
    tensors = layer(SCHEMES[0])
    tensors["weight_packed"][3, 1] ^= 1 << 9
    with pytest.raises(ValueError, match="do not add up"):
        validate(tensors, SCHEMES[0])
    validate(tensors, SCHEMES[0], check_codes=False)


def test_integer_zero_points_are_whole() -> None:
    with pytest.raises(ValueError, match=r"whole numbers in \[0, 15\]"):
        scheme = QuantScheme(weights=QuantArgs(zero_point_domain="integer"), timestep_groups=3)
        validate(changed("weight_zero_point", torch.full((N, 1), 7.5)), scheme)


def test_groups_must_divide_the_input() -> None:
    with pytest.raises(ValueError, match="in_features 40 is not a multiple of group_size 16"):
        layer_layout(40, N, GROUPS, has_bias=False)
