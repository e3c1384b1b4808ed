"""Packed layers in the triton backend: exact sums, and an epilogue within its roundings (tests/support)."""

import copy
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qvgen.kernels import registry
from qvgen.kernels.registry import KernelPreference
from qvgen.kernels.triton import configurations
from qvgen.nn.layers_together import feed_forward, linears
from qvgen.nn.packed_linear import PackedLinear
from qvgen.nn.timestep import group_of, set_timestep
from qvgen.packing.bits import unpack
from qvgen.quant.scheme import QuantArgs, QuantScheme
from tests.support.packed_reference import WEIGHTS, build, inputs, reference, scheme_of

STEPS = torch.tensor([10.0, 900.0])
CHANNEL = WEIGHTS[2]
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def prepared(weight: QuantArgs, weight_bits: int, activation_bits: int, symmetric: bool, n: int, k: int) -> PackedLinear:
    layer, _ = build(scheme_of(weight, weight_bits, activation_bits, symmetric), n, k)
    words = layer.to(DEVICE).weight_packed.clone()
    layer.prepare_backend(KernelPreference.TRITON)
    assert torch.equal(layer.weight_packed, words)
    return layer


def group(size: int, symmetric: bool = False) -> QuantArgs:
    return QuantArgs(strategy="group", group_size=size, symmetric=symmetric)


def moved(*shape: int) -> torch.Tensor:
    return inputs(*shape).to(DEVICE)


def assert_equals_reference(layer: PackedLinear, x: torch.Tensor, timestep: torch.Tensor) -> None:
    """tests/support's comparison, with the layer moved to the card where there is one."""
    on_cpu = copy.deepcopy(layer).cpu()
    expected, allowed = reference(on_cpu, x.cpu(), group_of_cpu(x, timestep, on_cpu))
    set_timestep(timestep.to(DEVICE))
    error = np.abs(layer(x.to(DEVICE)).double().cpu().numpy() - expected)
    assert (error <= allowed).all(), f"error {error.max()}, allowed {allowed.flat[error.argmax()]}"


def group_of_cpu(x: torch.Tensor, timestep: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
    set_timestep(timestep.cpu())
    return group_of(x.cpu(), layer.scheme.timestep_groups)


@pytest.mark.parametrize("activation_bits", [2, 4, 8])
@pytest.mark.parametrize("weight_bits", range(2, 9))
def test_every_width_unpacked_in_the_loop(weight_bits: int, activation_bits: int) -> None:
    assert configurations.unpacks_in_loop(6, 1, weight_bits) == (weight_bits <= 4)
    assert_equals_reference(prepared(CHANNEL, weight_bits, activation_bits, False, 21, 44), inputs(2, 3, 44), STEPS)


@pytest.mark.parametrize("weight_bits", [2, 3, 4, 5, 8])
def test_every_width_unpacked_whole(weight_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configurations, "SCRATCH_FROM", 0)
    assert_equals_reference(prepared(CHANNEL, weight_bits, 4, False, 21, 44), inputs(2, 3, 44), STEPS)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_every_kind_of_grid(weight: QuantArgs, symmetric: bool) -> None:
    assert_equals_reference(prepared(weight, 4, 4, symmetric, 9, 64), inputs(2, 3, 64), STEPS)


@pytest.mark.parametrize(("weight", "bits"), [(group(16), 3), (group(48), 4), (group(32, True), 2), (group(160), 4)], ids=str)
def test_groups(weight: QuantArgs, bits: int) -> None:
    assert weight.group_size is not None
    assert_equals_reference(
        prepared(weight, bits, 4, False, 9, 2 * weight.group_size), inputs(2, 3, 2 * weight.group_size), STEPS
    )


@pytest.mark.parametrize("tokens", [1, 17, 40])
def test_tiles_that_reach_over_the_end(tokens: int) -> None:
    assert_equals_reference(prepared(CHANNEL, 4, 4, False, 66, 130), inputs(2, tokens, 130), STEPS)


def test_a_long_sum_stays_exact() -> None:
    """8 bits at the largest K that fits 32 bits would take minutes here; codes at their ends on the way there do not."""
    layer = prepared(QuantArgs(), 8, 8, False, 3, 4096)
    x = torch.where(torch.arange(4096) % 3 == 0, -9.0, 9.0).expand(1, 2, -1)
    assert_equals_reference(layer, x, torch.tensor([500.0]))


def test_the_largest_k_is_refused_beyond() -> None:
    layer = build(scheme_of(QuantArgs(), 8, 8, False), 1, 33026)[0].to(DEVICE)
    with pytest.raises(RuntimeError, match="in_features 33026 is more than 33025"):
        layer.prepare_backend(KernelPreference.TRITON)


def test_e4m3_gives_the_same_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    from qvgen.kernels.triton import launch

    layers = [prepared(CHANNEL, bits, 4, False, 9, 64) for bits in (2, 3, 4)]
    x = moved(2, 3, 64)
    set_timestep(STEPS.to(DEVICE))
    for scratch_from in (128, 0):
        monkeypatch.setattr(configurations, "SCRATCH_FROM", scratch_from)
        integers = [layer(x) for layer in layers]
        with monkeypatch.context() as patch:
            patch.setattr(launch, "uses_e4m3", lambda *_: True)
            assert all(torch.equal(layer(x), y) for layer, y in zip(layers, integers, strict=True))


def test_shared_inputs_feed_forward_gelu_and_outputs() -> None:
    q, k, v, more = (prepared(CHANNEL, 4, 4, False, 20 + i, 64) for i in range(4))
    down = prepared(CHANNEL, 4, 4, False, 8, 20)
    x = moved(2, 3, 64)
    set_timestep(STEPS.to(DEVICE))
    with torch.no_grad():
        assert all(torch.equal(y, one(x)) for y, one in zip(linears(x, [q, k, v, more]), (q, k, v, more), strict=True))
        out = torch.empty(2, 3, 20, dtype=torch.bfloat16, device=DEVICE)
        q.forward_into(x, out, gelu=True)
        torch.testing.assert_close(out, F.gelu(q(x), approximate="tanh").bfloat16())
        hidden = torch.empty(2, 3, 20, device=DEVICE)
        q.forward_into(x, hidden, gelu=True)
        assert torch.equal(feed_forward(x, q, down), down(hidden))
        assert q(moved(2, 0, 64)).shape == (2, 0, 20)
        half = q(x.half())
        assert half.dtype == torch.float16 and torch.equal(half, q(x.half().float()).half())


@pytest.mark.parametrize(
    "weight", [QuantArgs(num_bits=3), group(32, True), QuantArgs(num_bits=2, zero_point_domain="float")], ids=str
)
# Not bfloat16: the interpreter cuts float32 off there instead of rounding it.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weight_only_unpacked_whole_equals_the_reference(
    weight: QuantArgs, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configurations, "SCRATCH_FROM", 0)
    scheme = QuantScheme(weights=weight, input_activations=None)
    ours, theirs = (build(scheme, 10, 64)[0].to(DEVICE) for _ in range(2))
    ours.prepare_backend(KernelPreference.TRITON)
    theirs.prepare_backend(KernelPreference.REFERENCE)
    x = moved(2, 3, 64).to(dtype)
    assert torch.equal(ours(x), theirs(x))


# Float32 sums of 130 products and one rounding to float16, which a GELU follows in float32.
WEIGHT_ONLY = {"sums": 130 * 2**-23, "output": 2**-11}


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("weight", [*WEIGHTS[:3], WEIGHTS[4]], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weight_only_unpacked_in_the_loop(bits: int, weight: QuantArgs, gelu: bool) -> None:
    scheme = QuantScheme(weights=weight.model_copy(update={"num_bits": bits}), input_activations=None)
    layer, dense = build(scheme, 66, 130)
    layer.to(DEVICE).prepare_backend(KernelPreference.TRITON)
    x = inputs(2, 17, 130).half()
    out = torch.empty(2, 17, 66, device=DEVICE)
    layer.forward_into(x.to(DEVICE), out, gelu=gelu)
    assert layer.bias is not None
    expected = x.double() @ dense.double().T + layer.bias.cpu().double()
    if gelu:
        expected = F.gelu(expected, approximate="tanh")
    # The zero point's share is taken off a sum that is larger: x times the largest code.
    size = x.double().abs().sum(-1, keepdim=True) * 2**bits * layer.weight_scale.cpu().double().max() + 1
    assert ((out.cpu().double() - expected).abs() <= WEIGHT_ONLY["sums"] * size).all()
    half = layer(x.to(DEVICE)).cpu()
    if not gelu:
        assert half.dtype == torch.float16
        rounding = WEIGHT_ONLY["output"] * expected.abs() + 2**-24
        assert ((half.double() - expected).abs() <= WEIGHT_ONLY["sums"] * size + rounding).all()


def test_opcheck_and_one_graph() -> None:
    layer = prepared(CHANNEL, 4, 4, False, 5, 32)
    x = moved(2, 3, 32)
    set_timestep(STEPS.to(DEVICE))
    arguments = (x, *layer._tensors(), *layer._arguments(x))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(registry_op(), (*arguments, False, None), test_utils=checks)
    into = torch.ops.qvgen.quantized_linear_out.default
    torch.library.opcheck(into, (*arguments, torch.empty(2, 3, 5, device=DEVICE), True), test_utils=checks)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))


def registry_op() -> object:
    return getattr(torch.ops.qvgen, registry.OP).default


def test_stored_words_come_back_for_odd_sizes() -> None:
    from qvgen.kernels.triton.layout import to_planes, to_words
    from qvgen.packing.bits import pack

    for bits in range(2, 9):
        for k, groups in ((1, 1), (7, 1), (36, 3), (129, 1)):
            codes = torch.randint(0, 2**bits, (3, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(k))
            words = pack(codes, bits)
            back = to_words(to_planes(words, k, groups, bits), k, groups, bits)
            assert torch.equal(back, words) and torch.equal(unpack(back, bits, k), codes)


if DEVICE == "cuda":

    def test_a_cuda_graph_records_a_layer() -> None:
        layer, x = prepared(CHANNEL, 4, 4, False, 20, 64), moved(2, 3, 64)
        set_timestep(STEPS.to(DEVICE))
        with torch.no_grad():
            expected = layer(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x)
            graph.replay()
        assert torch.equal(y, expected)
