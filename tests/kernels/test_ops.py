"""The op as torch sees it, and the registry behind it. What the op computes: tests/numerics/test_packed_linear.py."""

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qvgen.kernels import registry
from qvgen.kernels.reference import ReferenceBackend
from qvgen.kernels.registry import KernelPreference, NotBuilt, PackedWeight, backends, choose, explain
from qvgen.nn.layers_together import feed_forward, linears
from qvgen.nn.packed_linear import PackedLinear
from qvgen.nn.timestep import set_timestep
from qvgen.quant.fake_quantizer import WeightQuantizer
from qvgen.quant.scheme import QuantArgs, QuantScheme

SCHEMES = {
    "w4a4": QuantScheme(timestep_groups=3),
    "w4a4-symmetric": QuantScheme(
        weights=QuantArgs(symmetric=True), input_activations=QuantArgs(symmetric=True, strategy="token"), timestep_groups=3
    ),
    "w8a8": QuantScheme(
        weights=QuantArgs(num_bits=8), input_activations=QuantArgs(num_bits=8, strategy="token"), timestep_groups=3
    ),
    "w3-group": QuantScheme(weights=QuantArgs(num_bits=3, strategy="group", group_size=16), timestep_groups=3),
    "w4a16": QuantScheme(weights=QuantArgs(), input_activations=None),
}


def build(scheme: QuantScheme, n: int = 5, k: int = 32, bias: bool = True) -> PackedLinear:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer.min_max(scheme.weights, weight)
    clips = None if scheme.input_activations is None else torch.linspace(0.7, 1, scheme.timestep_groups)
    set_timestep(torch.tensor([10.0, 900.0]))
    codes, grid = quantizer.codes(weight), quantizer.export()
    return PackedLinear.from_codes(codes, *grid, clips, clips, torch.ones(n) if bias else None, scheme)


def stored(layer: PackedLinear) -> PackedWeight:
    return PackedWeight(
        layer.weight_packed,
        layer.weight_scale,
        layer.weight_zero_point,
        layer.weight_row_sum,
        layer.in_features,
        layer.scheme.weights,
        layer.scheme.input_activations,
    )


@pytest.fixture(autouse=True)
def _fresh_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    monkeypatch.setattr(registry, "_announced", set())
    yield


def usable(layer: PackedLinear) -> list[str]:
    """Names of the backends that can run a layer on this machine."""
    weight, device = stored(layer), layer.weight_packed.device.type
    return [
        b.name for b in backends() if not b.available() and not b.supports(weight) and (not b.devices or device in b.devices)
    ]


def calls(scheme: QuantScheme, x: torch.Tensor, backend: str, bias: bool = True) -> list[tuple[Any, tuple[Any, ...]]]:
    """Each op with arguments for a layer of 5 outputs, layers of 5 and 7, and a feed-forward 32 -> 64 -> 5."""
    layers = [build(scheme, n, k, bias) for n, k in ((5, 32), (7, 32), (64, 32), (5, 64))]
    for layer in layers:
        layer.prepare_backend(KernelPreference(backend))
    five, seven, up, down = (layer._tensors() for layer in layers)
    arguments = layers[0]._arguments(x)
    out = torch.empty(*x.shape[:-1], 5)
    return [
        (torch.ops.qvgen.quantized_linear.default, (x, *five, *arguments, False, None)),
        (torch.ops.qvgen.quantized_linear.default, (x, *five, *arguments, True, torch.float32)),
        (torch.ops.qvgen.quantized_linear_out.default, (x, *five, *arguments, out, True)),
        (torch.ops.qvgen.quantized_linears.default, (x, *map(list, zip(five, seven, strict=True)), *arguments)),
        (torch.ops.qvgen.quantized_feed_forward.default, (x, *map(list, zip(up, down, strict=True)), *arguments)),
    ]


def shapes(result: Any) -> list[tuple[torch.Size, torch.dtype]]:
    results = result if isinstance(result, list) else [result]
    return [(y.shape, y.dtype) for y in results if y is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_opcheck(scheme: QuantScheme, bias: bool, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 32, dtype=dtype)
    for name in usable(build(scheme)):
        for op, arguments in calls(scheme, x, name, bias):
            torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


# What opcheck does besides compiles the op, which takes a second each; one dtype and two schemes are enough for that.
@pytest.mark.parametrize("scheme", [SCHEMES["w4a4"], SCHEMES["w4a16"]], ids=["w4a4", "w4a16"])
def test_opcheck_with_dynamic_shapes(scheme: QuantScheme) -> None:
    for name in usable(build(scheme)):
        for op, arguments in calls(scheme, torch.randn(2, 3, 32), name):
            torch.library.opcheck(op, arguments, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("shape", [(2, 32), (2, 3, 32), (2, 3, 4, 32), (2, 0, 32)], ids=str)
def test_fakes_have_the_shapes_and_dtypes_of_results(shape: tuple[int, ...]) -> None:
    wanted = [[5], [5], [], [5, 7], [5]]
    for dtype in (torch.float32, torch.bfloat16):
        for name in usable(build(SCHEMES["w4a4"])):
            for (op, arguments), features in zip(
                calls(SCHEMES["w4a4"], torch.randn(shape, dtype=dtype), name), wanted, strict=True
            ):
                real = shapes(op(*arguments))
                with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                    moved = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
                    fake = shapes(op(*moved))
                assert fake == real
                assert [size for size, _ in real] == [(*shape[:-1], n) for n in features]


def test_out_must_fit() -> None:
    for name in usable(build(SCHEMES["w4a4"])):
        op, arguments = calls(SCHEMES["w4a4"], torch.randn(2, 3, 32), name)[2]
        *arguments, _, gelu = arguments
        for out in (torch.empty(2, 3, 6), torch.empty(6, 5), torch.empty(2, 5, 3).transpose(1, 2), torch.empty(2, 3, 5, 1)):
            with pytest.raises(ValueError, match=r"out must be contiguous and of shape \(2, 3, 5\)"):
                op(*arguments, out, gelu)


def test_a_feed_forward_has_two_layers() -> None:
    for name in usable(build(SCHEMES["w4a4"])):
        op, (x, *rest) = calls(SCHEMES["w4a4"], torch.randn(2, 3, 32), name)[4]
        with pytest.raises(ValueError, match="a feed-forward has 2 layers, got 1"):
            op(x, *(tensors[:1] for tensors in rest[:7]), *rest[7:])


class Block(nn.Module):
    """Packed layers in every way that they are called."""

    def __init__(self, scheme: QuantScheme) -> None:
        super().__init__()
        self.q, self.k, self.v = (build(scheme, 32) for _ in range(3))
        self.up, self.down = build(scheme, 64), build(scheme, 32, 64)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = linears(x, [self.q, self.k, self.v])
        return q, k, self.q(x), feed_forward(v, self.up, self.down)  # no arithmetic between: Inductor compiles it for 15 s


def equal(results: Any, expected: Any) -> bool:
    pairs = zip(results, expected, strict=True) if isinstance(expected, tuple) else [(results, expected)]
    return all(torch.equal(a, b) for a, b in pairs)


def graphs(compiled_from: nn.Module, x: torch.Tensor) -> tuple[list[Any], list[list[str]]]:
    """Results of three calls of the compiled module, and the calls in each graph that was made."""
    found = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        found.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(compiled_from, fullgraph=True, backend=count)
    return [compiled(x) for _ in range(3)], found


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_compiles_whole_before_the_first_call(scheme: QuantScheme) -> None:
    layer, x = build(scheme), torch.randn(2, 3, 32)
    outputs, found = graphs(layer, x)
    assert torch.equal(outputs[-1], layer(x))
    assert len(found) == 1  # once, and not again after the first call has prepared the layer
    assert len([target for target in found[0] if "quantized_linear" in target]) == 1


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_shared_inputs_and_feed_forwards_compile_to_one_op_each(scheme: QuantScheme) -> None:
    block, x = Block(scheme), torch.randn(2, 3, 32)
    outputs, found = graphs(block, x)
    assert equal(outputs[-1], block(x))
    assert len(found) == 1
    ops = [target.removeprefix("qvgen.") for target in found[0] if target.startswith("qvgen.")]
    assert ops == ["quantized_linears.default", "quantized_linear.default", "quantized_feed_forward.default"]


@pytest.mark.slow
@pytest.mark.parametrize("make", [build, Block], ids=["layer", "block"])
def test_inductor_computes_the_same(make: Any) -> None:
    module, x = make(SCHEMES["w4a4"]), torch.randn(2, 3, 32)
    torch.compiler.reset()
    assert equal(torch.compile(module, fullgraph=True)(x), module(x))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("make", [build, Block], ids=["layer", "block"])
def test_exports(make: Any, strict: bool) -> None:
    module, x = make(SCHEMES["w4a4"]), torch.randn(2, 3, 32)
    expected = module(x)  # first: it prepares the layers, which a non-strict export cannot
    with torch.no_grad():
        exported = torch.export.export(module, (x,), strict=strict).module()
    assert equal(exported(x), expected)


def test_a_strict_export_prepares_layers() -> None:
    layer, x = build(SCHEMES["w4a4"]), torch.randn(2, 3, 32)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,), strict=True).module()
    assert torch.equal(exported(x), layer(x))


@pytest.mark.parametrize("name", [b.name for b in backends()])
def test_every_backend_is_reachable_or_says_why_not(name: str) -> None:
    layer = build(SCHEMES["w4a4"])
    if name in usable(layer):
        layer.prepare_backend(KernelPreference(name))
        assert layer.backend == name
        assert layer(torch.randn(2, 3, 32)).isfinite().all()
    else:
        backend = registry.get(name)
        reason = backend.available() or backend.supports(stored(layer)) or f"runs on {', '.join(backend.devices)} only"
        with pytest.raises(RuntimeError, match=re.escape(reason)):
            layer.prepare_backend(KernelPreference(name))
        assert layer.backend is None


def test_every_preference_is_a_backend() -> None:
    assert {b.name for b in backends()} == set(KernelPreference) - {KernelPreference.AUTO}


def test_auto_falls_back_and_says_so_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.register(NotBuilt("cpu", ("cpu",), "no compiler was found"))
    monkeypatch.setattr(registry._log, "disabled", False)  # which dvc and alembic do to loggers when they set up their own
    with caplog.at_level(logging.INFO, logger="qvgen"):
        for _ in range(3):
            build(SCHEMES["w4a4"])(torch.randn(2, 3, 32))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "run in backend 'reference'" in record.message
    assert "cpu: no compiler was found" in record.message
    assert "triton" not in record.message  # was never a candidate on this device


def test_auto_takes_the_fastest_that_supports_the_layer() -> None:
    class OnlyEightBits(ReferenceBackend):
        name, devices = "cpu", ("cpu",)

        def supports(self, layer: PackedWeight) -> str:
            return "" if layer.args.num_bits == 8 else f"num_bits {layer.args.num_bits}: only 8"

    registry.register(OnlyEightBits())
    assert choose(stored(build(SCHEMES["w8a8"]))).name == "cpu"
    assert choose(stored(build(SCHEMES["w4a4"]))).name == "reference"
    with pytest.raises(RuntimeError, match="num_bits 4: only 8"):
        choose(stored(build(SCHEMES["w4a4"])), KernelPreference.CPU)


def test_the_environment_forces_and_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.register(NotBuilt("cpu", ("cpu",), "no compiler was found"))
    layer = build(SCHEMES["w4a4"])
    monkeypatch.setenv("QVGEN_KERNELS", "reference")
    layer(torch.randn(2, 3, 32))
    assert layer.backend == "reference"
    monkeypatch.setenv("QVGEN_KERNELS", "cpu")
    with pytest.raises(RuntimeError, match=r"'cpu' was asked for and cannot run: no compiler was found; .*QVGEN_KERNELS=auto"):
        build(SCHEMES["w4a4"])(torch.randn(2, 3, 32))
    monkeypatch.setenv("QVGEN_KERNELS", "cuda")
    with pytest.raises(ValueError, match="QVGEN_KERNELS='cuda' is not one of auto, reference, cpu, triton"):
        build(SCHEMES["w4a4"])(torch.randn(2, 3, 32))


def test_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.register(NotBuilt("cpu", ("cpu",), "no compiler was found"))
    rows = {row.backend: row for row in explain("cpu") if row.op == registry.OP}
    assert list(rows) == [b.name for b in backends()]
    assert rows["reference"] == ("quantized_linear", "reference", True, "", True)
    assert rows["cpu"] == ("quantized_linear", "cpu", False, "no compiler was found", False)
    assert all(row.reason for row in rows.values() if not row.available)
    monkeypatch.setenv("QVGEN_KERNELS", "cpu")
    assert not any(row.chosen for row in explain("cpu") if row.op == registry.OP)


def test_a_backend_must_have_a_known_name() -> None:
    with pytest.raises(ValueError, match="'npu' is not one of auto, reference, cpu, triton"):
        registry.register(NotBuilt("npu", (), "?"))
