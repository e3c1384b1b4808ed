"""The packed layer against an independent numpy reference (packed_reference.py)."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qvgen.nn.packed_linear import PackedLinear, packed_layers
from qvgen.nn.timestep import group_of, set_timestep
from qvgen.packing.layout import PACKED_NAMES
from qvgen.quant.fake_quantizer import ActivationQuantizer, WeightQuantizer
from qvgen.quant.scheme import QuantArgs, QuantScheme
from tests.support.packed_reference import GROUPS, WEIGHTS, assert_equals_reference, build, inputs, scheme_of

# Fake quantization multiplies dequantized floats: every product and partial sum rounds.
FAKE_QUANT_RELATIVE = 1e-4
SHAPES = [(1, 1, 1), (1, 3, 5), (2, 1, 31), (3, 7, 33), (2, 64, 128), (1, 16, 257)]  # M per sample, N, K


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("symmetric_inputs", [False, True])
@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda a: f"{a.strategy}-{a.symmetric}-{a.zero_point_domain}")
def test_equals_the_reference(weight: QuantArgs, symmetric_inputs: bool, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    for weight_bits, activation_bits in [(2, 2), (3, 3), (4, 4), (4, 8), (8, 4), (8, 8), (5, 6), (7, 2)]:
        layer, _ = build(scheme_of(weight, weight_bits, activation_bits, symmetric_inputs), n, k)
        assert_equals_reference(layer, inputs(3, m, k), torch.tensor([0.0, 999.0, 450.0]))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("group_size", "k"), [(2, 2), (16, 48), (32, 32)])
def test_group_strategy(symmetric: bool, group_size: int, k: int) -> None:
    weight = QuantArgs(strategy="group", group_size=group_size, symmetric=symmetric)
    for bits in (2, 4, 8):
        layer, dense = build(scheme_of(weight, bits, bits, symmetric=False), 5, k)
        assert_equals_reference(layer, inputs(2, 3, k), torch.tensor([100.0]))
        assert torch.equal(layer.dequantize(), dense)


@settings(deadline=None, max_examples=60)
@given(
    weight=st.sampled_from(WEIGHTS),
    weight_bits=st.integers(2, 8),
    activation_bits=st.integers(2, 8),
    symmetric=st.booleans(),
    m=st.integers(1, 4),
    n=st.integers(1, 9),
    k=st.integers(1, 70),
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_scheme(
    weight: QuantArgs,
    weight_bits: int,
    activation_bits: int,
    symmetric: bool,
    m: int,
    n: int,
    k: int,
    magnitude: float,
    seed: int,
) -> None:
    layer, dense = build(scheme_of(weight, weight_bits, activation_bits, symmetric), n, k, seed)
    assert torch.equal(layer.dequantize(), dense)
    assert_equals_reference(layer, magnitude * inputs(2, m, k, seed + 1), torch.tensor([77.0, 930.0]))


@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda a: f"{a.strategy}-{a.symmetric}-{a.zero_point_domain}")
def test_dequantize_is_the_fake_quantized_weight_bit_for_bit(weight: QuantArgs, weight_bits: int) -> None:
    for n, k in [(1, 1), (3, 33), (17, 100)]:
        layer, dense = build(scheme_of(weight, weight_bits, 4, symmetric=False), n, k)
        assert torch.equal(layer.dequantize(), dense)


def test_agrees_with_the_training_forward() -> None:
    scheme = scheme_of(QuantArgs(zero_point_domain="float"), 4, 4, symmetric=False)
    layer, dense = build(scheme, 48, 96)
    x, timestep = inputs(3, 10, 96), torch.tensor([20.0, 500.0, 980.0])
    set_timestep(timestep)
    clips = layer.input_clip_lower, layer.input_clip_upper
    assert scheme.input_activations is not None
    quantizer = ActivationQuantizer(scheme.input_activations, *clips)
    with torch.no_grad():
        # The logits of the clips round: take the clips back from them, as export does.
        layer.input_clip_lower, layer.input_clip_upper = quantizer.export()
        trained = F.linear(quantizer(x, group_of(x, layer.scheme.timestep_groups)), dense, layer.bias)
        torch.testing.assert_close(
            layer(x), trained, rtol=FAKE_QUANT_RELATIVE, atol=FAKE_QUANT_RELATIVE * float(trained.abs().max())
        )


@pytest.mark.parametrize("k", [256, 258, 259, 2000, 5000])
def test_integer_sums_beyond_float32_are_exact(k: int) -> None:
    # Scales of 1 and zero points of 0, so that the output is the sum itself: up to 255 * 255 * 5000, far beyond 2^24.
    scheme = scheme_of(QuantArgs(zero_point_domain="integer"), 8, 8, symmetric=False)
    generator = torch.Generator().manual_seed(k)
    codes = torch.randint(200, 256, (4, k), dtype=torch.uint8, generator=generator)
    ones, clips = torch.ones(4, 1), torch.ones(GROUPS)
    layer = PackedLinear.from_codes(codes, ones, torch.zeros(4, 1), clips, clips, None, scheme)
    set_timestep(torch.tensor([0.0]))
    x = torch.randint(200, 256, (1, 3, k), generator=generator)
    x[..., 0] = 255  # makes the token's scale 1
    expected = (x.numpy().astype(np.int64) @ codes.numpy().astype(np.int64).T).astype(np.float32)
    assert np.array_equal(layer(x.float()).numpy(), expected)


def test_extreme_codes() -> None:
    for weight_code, sign, bits in product((0, 255), (-1.0, 1.0), (2, 4, 8)):
        scheme = scheme_of(QuantArgs(zero_point_domain="integer"), bits, bits, symmetric=False)
        codes = torch.full((3, 40), weight_code, dtype=torch.uint8).clamp(max=scheme.weights.max_code)
        scale, zero_point, clips = torch.full((3, 1), 0.25), torch.ones(3, 1), torch.ones(GROUPS)
        layer = PackedLinear.from_codes(codes, scale, zero_point, clips, clips, None, scheme)
        assert_equals_reference(layer, torch.full((1, 2, 40), sign * 7.0), torch.tensor([0.0]))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 5.5, -5.5, 1e-42])
def test_constant_tokens(value: float, symmetric: bool) -> None:
    layer, dense = build(scheme_of(QuantArgs(), 4, 4, symmetric), 6, 20)
    ones = torch.ones(GROUPS)
    layer.input_clip_lower, layer.input_clip_upper = ones, ones
    x = torch.full((1, 2, 20), value)
    assert_equals_reference(layer, x, torch.tensor([0.0]))
    # Both ends of the range are codes, so a constant token is represented exactly (1e-42: up to its own size).
    torch.testing.assert_close(layer(x)[0, 0], layer.bias + value * dense.sum(1), rtol=1e-5, atol=1e-5)


def test_rows_of_zeros() -> None:
    weight = torch.randn(3, 10)
    weight[1] = 0
    scheme = scheme_of(QuantArgs(), 4, 4, symmetric=False)
    quantizer = WeightQuantizer.min_max(scheme.weights, weight)
    clips = torch.ones(GROUPS)
    layer = PackedLinear.from_codes(quantizer.codes(weight), *quantizer.export(), clips, clips, None, scheme)
    set_timestep(torch.tensor([0.0]))
    assert torch.equal(layer(inputs(1, 4, 10))[..., 1], torch.zeros(1, 4))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (8, False)])
def test_what_is_not_finite_stays_in_its_token(poison: float, bits: int, symmetric: bool) -> None:
    layer, _ = build(scheme_of(QuantArgs(zero_point_domain="float"), bits, bits, symmetric), 6, 300)
    set_timestep(torch.tensor([500.0]))
    x = inputs(2, 3, 300)
    clean = layer(x)
    x[1, 2, 17] = poison
    dirty = layer(x)
    assert dirty[1, 2].isnan().all()
    dirty[1, 2] = clean[1, 2]
    assert torch.equal(dirty, clean)


def test_each_sample_has_the_clips_of_its_timestep() -> None:
    layer, _ = build(scheme_of(QuantArgs(), 4, 4, symmetric=False), 6, 32)
    x = inputs(1, 4, 32).expand(2, -1, -1)
    set_timestep(torch.tensor([10.0, 950.0]))
    together = layer(x)
    for i, t in enumerate((10.0, 950.0)):
        set_timestep(torch.tensor([t]))
        assert torch.equal(layer(x[:1])[0], together[i])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_differ_only_in_the_last_rounding(dtype: torch.dtype) -> None:
    layer, _ = build(scheme_of(QuantArgs(), 4, 4, symmetric=False), 6, 32)
    set_timestep(torch.tensor([500.0]))
    x = inputs(2, 3, 32).to(dtype)
    assert torch.equal(layer(x), layer(x.float()).to(dtype))


@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda a: f"{a.strategy}-{a.symmetric}-{a.zero_point_domain}")
def test_weight_only_multiplies_the_dequantized_weight(weight: QuantArgs) -> None:
    scheme = QuantScheme(weights=weight, input_activations=None)
    layer, dense = build(scheme, 6, 32)
    x = inputs(2, 3, 32)
    torch.testing.assert_close(layer(x), F.linear(x, dense, layer.bias))
    half = layer.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(layer.dequantize(), dense)


@pytest.mark.parametrize("shape", [(4, 32), (2, 3, 32), (2, 1, 5, 32), (0, 3, 32), (2, 0, 32)], ids=str)
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    layer, _ = build(scheme_of(QuantArgs(), 4, 4, symmetric=False), 6, 32)
    set_timestep(torch.tensor([300.0]))
    x = torch.randn(shape)
    out = layer(x)
    assert out.shape == (*shape[:-1], 6)
    torch.testing.assert_close(out.reshape(-1, 6), layer(x.reshape(1, -1, 32))[0] if x.numel() else out.reshape(-1, 6))


def test_state_dict_round_trip() -> None:
    scheme = scheme_of(QuantArgs(), 3, 4, symmetric=False)
    layer, _ = build(scheme, 6, 33)
    state = layer.state_dict()
    assert set(state) == {*PACKED_NAMES, "bias"}
    empty = PackedLinear(33, 6, True, scheme, device="cpu")
    x = inputs(1, 2, 33)
    set_timestep(torch.tensor([0.0]))
    empty.load_state_dict(state)
    assert torch.equal(empty(x), layer(x))
    other, _ = build(scheme, 6, 33, seed=5)
    set_timestep(torch.tensor([0.0]))
    empty.load_state_dict(other.state_dict())  # after a forward: what it prepared must not survive
    assert torch.equal(empty(x), other(x))
    meta = PackedLinear(33, 6, True, scheme)
    meta.load_state_dict(state, assign=True)
    assert torch.equal(meta(x), layer(x))


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_casting_leaves_the_grid_alone(cast: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    layer, dense = build(scheme_of(QuantArgs(zero_point_domain="float"), 4, 4, symmetric=False), 6, 32)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    after = cast(torch.nn.Sequential(layer))[0].state_dict()
    for name in PACKED_NAMES:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])
    assert after["bias"].dtype != torch.float32
    assert torch.equal(layer.dequantize(), dense)


def test_errors() -> None:
    scheme = scheme_of(QuantArgs(), 4, 4, symmetric=False)
    layer, _ = build(scheme, 6, 32)
    with pytest.raises(ValueError, match="input has 31 features, this layer takes 32"):
        layer(torch.zeros(1, 31))
    with pytest.raises(RuntimeError, match="timestep of this call is not known"):
        layer(torch.zeros(1, 32))
    set_timestep(torch.tensor([1.0, 2.0]))
    with pytest.raises(RuntimeError, match="2 timesteps were given for an input of 3 samples"):
        layer(torch.zeros(3, 32))
    codes, ones, clips = torch.zeros(6, 32, dtype=torch.uint8), torch.ones(6, 1), torch.ones(GROUPS)
    arguments = (clips, clips, None, scheme)
    with pytest.raises(ValueError, match="weight_zero_point missing"):
        PackedLinear.from_codes(codes, ones, None, *arguments)
    with pytest.raises(ValueError, match=r"weight_scale: expected \[6, 1\]"):
        PackedLinear.from_codes(codes, ones[:3], ones, *arguments)
    with pytest.raises(ValueError, match="at most 15, found 16"):
        PackedLinear.from_codes(codes + 16, ones, ones, *arguments)


def test_tells_what_it_is() -> None:
    layer, _ = build(scheme_of(QuantArgs(), 4, 4, symmetric=False), 6, 32)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), layer)
    assert [name for name, _ in packed_layers(model)] == ["1"]
    assert "in_features=32, out_features=6, bias=True, W4A4, asymmetric, channel" in repr(model)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("name", ["weight_packed", "weight_row_sum"])
def test_codes_that_do_not_add_up_are_not_loaded(name: str, prepared: bool) -> None:
    """Both of another layer, one of them alone, and one flipped bit; what was there before stays."""
    weight = QuantArgs(num_bits=4, strategy="group", group_size=8)
    layers = [build(scheme_of(weight, 4, 4, symmetric=False), 5, 16, seed=seed)[0] for seed in (0, 1)]
    before, other = ({key: tensor.clone() for key, tensor in layer.state_dict().items()} for layer in layers)
    if prepared:
        layers[0].prepare_backend()
    flipped = other[name].clone()
    flipped[2, 1] ^= 1
    for state, strict in ((other | {name: flipped}, True), ({name: other[name]}, False), (other | {name: before[name]}, True)):
        with pytest.raises(RuntimeError, match="weight_packed: the codes do not add up to weight_row_sum"):
            layers[0].load_state_dict(state, strict=strict)
        assert all(torch.equal(tensor, before[key]) for key, tensor in layers[0].state_dict().items())
    layers[0].load_state_dict(other)
    assert all(torch.equal(tensor, other[key]) for key, tensor in layers[0].state_dict().items())
