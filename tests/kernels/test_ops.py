"""The op as torch sees it, and the registry behind it. What the op computes: tests/numerics/test_packed_linear.py."""

import logging
from collections.abc import Iterator

import pytest
import torch

from qvgen.kernels import registry
from qvgen.kernels.ops import quantized_linear
from qvgen.kernels.reference import ReferenceBackend
from qvgen.kernels.registry import KernelPreference, NotBuilt, PackedWeight, backends, choose, explain
from qvgen.nn.packed_linear import PackedLinear
from qvgen.nn.timestep import TimestepState
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
    state = TimestepState(scheme.timestep_groups)
    state.set(torch.tensor([10.0, 900.0]))
    codes, grid = quantizer.codes(weight), quantizer.export()
    return PackedLinear.from_codes(codes, *grid, clips, clips, torch.ones(n) if bias else None, scheme, state)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_opcheck(scheme: QuantScheme, bias: bool, dtype: torch.dtype) -> None:
    layer = build(scheme, bias=bias)
    for name in usable(layer):
        prepared = layer.prepare_backend(KernelPreference(name))
        activations = scheme.input_activations
        arguments = (
            torch.randn(2, 3, 32, dtype=dtype),
            *prepared[1:],
            layer.input_clip_lower,
            layer.input_clip_upper,
            layer.timestep.of(torch.empty(2, 3, 32)),
            layer.bias,
            scheme.weights.num_bits,
            activations and activations.num_bits,
            bool(activations and activations.symmetric),
            name,
        )
        torch.library.opcheck(quantized_linear, arguments)
        assert quantized_linear(*arguments).dtype == dtype


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_compiles_whole_before_the_first_call(scheme: QuantScheme) -> None:
    layer = build(scheme)
    frames = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        frames.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=count)
    x = torch.randn(2, 3, 32)
    outputs = [compiled(x) for _ in range(3)]
    assert torch.equal(outputs[-1], layer(x))
    assert len(frames) == 1  # once, and not again after the first call has prepared the layer
    assert len([target for target in frames[0] if "quantized_linear" in str(target)]) == 1


@pytest.mark.slow
def test_inductor_computes_the_same() -> None:
    layer, x = build(SCHEMES["w4a4"]), torch.randn(2, 3, 32)
    torch.compiler.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_exports() -> None:
    layer, x = build(SCHEMES["w4a4"]), torch.randn(2, 3, 32)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,)).module()
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
        with pytest.raises(RuntimeError, match=reason):
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
    rows = {row.backend: row for row in explain("cpu")}
    assert list(rows) == [b.name for b in backends()]
    assert rows["reference"] == ("quantized_linear", "reference", True, "", True)
    assert rows["cpu"] == ("quantized_linear", "cpu", False, "no compiler was found", False)
    assert all(row.reason for row in rows.values() if not row.available)
    monkeypatch.setenv("QVGEN_KERNELS", "cpu")
    assert not any(row.chosen for row in explain("cpu"))


def test_a_backend_must_have_a_known_name() -> None:
    with pytest.raises(ValueError, match="'npu' is not one of auto, reference, cpu, triton"):
        registry.register(NotBuilt("npu", (), "?"))
