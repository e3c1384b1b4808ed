"""Whole layers in the cpu backend: against the numpy reference, each other, and what they cannot run."""

from math import pi

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qvgen.kernels.linear_ops import quantized_linear
from qvgen.kernels.registry import KernelPreference
from qvgen.nn.layers_together import feed_forward, linears
from qvgen.nn.packed_linear import PackedLinear
from qvgen.nn.timestep import group_of, set_timestep
from qvgen.quant.scheme import QuantArgs, QuantScheme
from tests.support.packed_reference import GROUPS, WEIGHTS, build, inputs, reference, scheme_of

TIMESTEPS = torch.tensor([0.0, 450.0, 999.0])  # of three samples, in different groups
PER_TEST = settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
# GELU changes by at most 1.13 times as much as its argument; float32 rounds its polynomial and exponential.
GELU_SLOPE, GELU_RELATIVE, GELU_ABSOLUTE = 1.13, 2e-6, 1e-6
BFLOAT16_ULP = 2**-8  # half a spacing, relative

weights = st.one_of(
    st.sampled_from(WEIGHTS),
    st.builds(
        lambda size, symmetric: QuantArgs(strategy="group", group_size=size, symmetric=symmetric),
        st.sampled_from([2, 5, 8, 16, 32, 33, 64]),
        st.booleans(),
    ),
)
widths = st.integers(2, 8)


def cpu_layer(scheme: QuantScheme, n: int, k: int, seed: int = 0, bias: bool = True) -> PackedLinear:
    layer, _ = build(scheme, n, k, seed, bias)
    layer.prepare_backend(KernelPreference.CPU)
    set_timestep(TIMESTEPS)
    return layer


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / pi) * (x + 0.044715 * x**3)))


def check_layer(layer: PackedLinear, x: torch.Tensor, out_dtype: torch.dtype, with_gelu: bool) -> None:
    expected, allowed = reference(layer, x, group_of(x, layer.scheme.timestep_groups))
    if with_gelu:
        expected = gelu(expected)
        allowed = GELU_SLOPE * allowed + GELU_RELATIVE * np.abs(expected) + GELU_ABSOLUTE
    if out_dtype == torch.bfloat16:
        allowed = allowed + BFLOAT16_ULP * (np.abs(expected) + allowed)
    y = quantized_linear(x, *layer._tensors(), *layer._arguments(x), with_gelu, out_dtype)
    assert y.dtype == out_dtype
    error = np.abs(y.double().numpy() - expected)
    assert (error <= allowed).all(), f"error {error.max()}, allowed {allowed.flat[error.argmax()]}"
    out = torch.full_like(y, torch.nan)
    layer.forward_into(x, out, with_gelu)
    assert torch.equal(out, y)


def test_the_fraction_of_a_zero_point_is_not_rounded_away(isa: str) -> None:
    # Outputs 16 to 31 have the offset 8, beside which a zero point near 0 loses bits.
    layer = cpu_layer(scheme_of(QuantArgs(zero_point_domain="float"), 4, 3, symmetric=False), 53, 2, 10, bias=False)
    check_layer(layer, inputs(3, 3, 2, 11), torch.float32, False)


@PER_TEST
@given(
    weight=weights,
    weight_bits=widths,
    activation_bits=widths,
    symmetric=st.booleans(),
    m=st.integers(1, 9),
    n=st.integers(1, 150),
    k=st.integers(1, 300),
    bias=st.booleans(),
    with_gelu=st.booleans(),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16])] * 2),
    seed=st.integers(0, 99),
)
def test_any_layer(
    isa: str,
    weight: QuantArgs,
    weight_bits: int,
    activation_bits: int,
    symmetric: bool,
    m: int,
    n: int,
    k: int,
    bias: bool,
    with_gelu: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
    seed: int,
) -> None:
    size = weight.group_size or 1
    layer = cpu_layer(scheme_of(weight, weight_bits, activation_bits, symmetric), n, -(-k // size) * size, seed, bias)
    check_layer(layer, inputs(3, m, layer.in_features, seed + 1).to(dtypes[0]), dtypes[1], with_gelu)


@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 4), (4, 8), (8, 8)], ids=lambda b: f"w{b[0]}a{b[1]}")
@pytest.mark.parametrize("shape", [(1, 64, 1536), (2, 130, 1000), (70, 65, 200), (40, 7, 2053)], ids=str)
def test_larger_layers(isa: str, shape: tuple[int, int, int], bits: tuple[int, int]) -> None:
    m, n, k = shape
    for weight in (QuantArgs(zero_point_domain="float"), QuantArgs(symmetric=True)):
        check_layer(cpu_layer(scheme_of(weight, *bits, symmetric=False), n, k), inputs(3, m, k), torch.float32, False)


@pytest.mark.parametrize("k", [256, 1031, 4096, 8192, 16384])
@pytest.mark.parametrize("lowest", [0, 200, 255])
def test_the_longest_sums_are_exact(isa: str, k: int, lowest: int) -> None:
    # Scales of 1 and zero points of 0: the output is the sum itself, up to 255 * 255 * 16384, near 2^30.
    generator = torch.Generator().manual_seed(k)
    x, q = (torch.randint(lowest, 256, (rows, k), generator=generator) for rows in (7, 66))
    x[:, 0], x[:, -1] = 255, 255  # makes the token's scale 1
    ones, clips = torch.ones(66, 1), torch.ones(GROUPS)
    scheme = scheme_of(QuantArgs(), 8, 8, symmetric=False)
    set_timestep(torch.tensor([0.0]))
    layer = PackedLinear.from_codes(q.to(torch.uint8), ones, torch.zeros(66, 1), clips, clips, None, scheme)
    layer.prepare_backend(KernelPreference.CPU)
    assert torch.equal(layer(x[None].float())[0], (x @ q.T).float())


@PER_TEST
@given(
    weight=weights,
    bits=st.tuples(widths, widths),
    symmetric=st.booleans(),
    m=st.integers(1, 40),
    outputs=st.lists(st.integers(1, 100), min_size=1, max_size=8),
    k=st.integers(1, 200),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    same_clips=st.booleans(),
)
def test_linears_equal_separate_calls(
    isa: str,
    weight: QuantArgs,
    bits: tuple[int, int],
    symmetric: bool,
    m: int,
    outputs: list[int],
    k: int,
    dtype: torch.dtype,
    same_clips: bool,
) -> None:
    size, scheme = weight.group_size or 1, scheme_of(weight, *bits, symmetric)
    layers = [cpu_layer(scheme, n, -(-k // size) * size, seed, bias=seed % 2 == 0) for seed, n in enumerate(outputs)]
    if same_clips:  # then codes are made once
        for layer in layers[1:]:
            layer.input_clip_lower, layer.input_clip_upper = layers[0].input_clip_lower, layers[0].input_clip_upper
    x = inputs(3, m, layers[0].in_features).to(dtype)
    for y, layer in zip(linears(x, layers), layers, strict=True):
        assert torch.equal(y, layer(x))


@PER_TEST
@given(
    weight=weights,
    bits=st.tuples(widths, widths),
    m=st.integers(1, 40),
    sizes=st.tuples(st.integers(1, 100), st.integers(1, 300), st.integers(1, 100)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_feed_forward_equals_two_calls(
    isa: str, weight: QuantArgs, bits: tuple[int, int], m: int, sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    k, hidden, n = sizes
    if size := weight.group_size:
        k, hidden = -(-k // size) * size, -(-hidden // size) * size
    scheme = scheme_of(weight, *bits, symmetric=False)
    check_feed_forward(cpu_layer(scheme, hidden, k), cpu_layer(scheme, n, hidden, 1, bias=False), inputs(3, m, k).to(dtype))


def check_feed_forward(up: PackedLinear, down: PackedLinear, x: torch.Tensor) -> None:
    hidden = torch.empty(*x.shape[:-1], up.out_features, dtype=x.dtype)
    up.forward_into(x, hidden, gelu=True)
    assert torch.equal(feed_forward(x, up, down), down(hidden))


def test_feed_forward_in_several_chunks(isa: str) -> None:
    # 15 MiB of the intermediate at a time: here 983 tokens of 4000 features, so that chunks begin within samples.
    scheme = scheme_of(QuantArgs(), 4, 4, symmetric=False)
    up, down = cpu_layer(scheme, 4000, 16), cpu_layer(scheme, 5, 4000, 1)
    check_feed_forward(up, down, inputs(3, 700, 16))


def test_half_precision_differs_only_in_the_last_rounding(isa: str) -> None:
    scheme = scheme_of(QuantArgs(), 4, 4, symmetric=False)
    # Biases in float16, for which there are no kernels either.
    layers = [cpu_layer(scheme, n, k, n).half() for n, k in ((70, 100), (200, 100), (64, 200))]
    x = inputs(3, 9, 100).half()
    expected = [layer(x.float()).half() for layer in layers[:2]]
    assert torch.equal(layers[0](x), expected[0])
    assert all(torch.equal(*pair) for pair in zip(linears(x, layers[:2]), expected, strict=True))
    assert torch.equal(feed_forward(x, layers[1], layers[2]), feed_forward(x.float(), layers[1], layers[2]).half())


@pytest.mark.parametrize("shape", [(100,), (3, 100), (3, 2, 5, 100), (0, 4, 100), (3, 0, 100)], ids=str)
def test_any_number_of_dimensions(isa: str, shape: tuple[int, ...]) -> None:
    layer = cpu_layer(scheme_of(QuantArgs(), 4, 4, symmetric=False), 70, 100)
    if len(shape) < 2 or 0 in shape:
        set_timestep(torch.tensor([0.0]))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    assert y.shape == (*shape[:-1], 70)
    rows = x.reshape(shape[0] if len(shape) > 1 else 1, -1, 100) if x.numel() else x.reshape(0, 1, 100)
    assert torch.equal(y.flatten(), layer(rows).flatten())
    strided = x.new_empty((*shape, 2))[..., 0].copy_(x)
    assert torch.equal(layer(strided), y)
