"""What cannot run on a GPU says why, in words: nothing here needs a GPU, and where one is missing it is made up."""

import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from qvgen.kernels import block_ops, registry
from qvgen.kernels.checked import check_layer
from qvgen.kernels.registry import LayerTensors
from qvgen.kernels.triton import backend
from qvgen.kernels.triton.attention import launch
from qvgen.nn.packed_linear import PackedLinear
from qvgen.nn.timestep import set_timestep
from tests.support.packed_reference import WEIGHTS, build, inputs, scheme_of


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    monkeypatch.setattr(registry, "_announced", set())
    backend.refusal.cache_clear()
    yield
    backend.refusal.cache_clear()


def machine(
    patch: pytest.MonkeyPatch, *capabilities: tuple[int, int], triton: str | None = "3.7.0", cuda: str | None = "13.0"
) -> None:
    """A machine with these cards, as the backend sees it."""
    find_spec = importlib.util.find_spec
    found: Callable[..., Any] = lambda name, *a: (triton and "here") if name == "triton" else find_spec(name, *a)  # noqa: E731
    patch.setattr(backend.importlib.util, "find_spec", found)
    version = importlib.metadata.version
    patch.setattr(backend.importlib.metadata, "version", lambda name: triton if name == "triton" else version(name))
    patch.setattr(torch.version, "cuda", cuda)
    patch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    patch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    patch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])


def test_triton_missing_or_old_and_a_build_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, said in (
        ({"triton": None}, "pip install qvgen[triton]"),
        ({"triton": "3.5.1"}, "triton 3.5.1 is older than 3.6"),
        ({"cuda": None}, "was built without CUDA"),
    ):
        with monkeypatch.context() as patch:
            machine(patch, (9, 0), **options)
            backend.refusal.cache_clear()
            assert said in backend.refusal()


def test_no_card_and_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert "the driver lists none (CUDA_VISIBLE_DEVICES?)" in backend.refusal()

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    backend.refusal.cache_clear()
    assert backend.refusal().endswith("too old (found version 11040).")


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, runs in (
        ((7, 5), False),
        ((8, 0), True),
        ((8, 7), True),
        ((9, 0), True),
        ((11, 0), False),
        ((12, 1), True),
    ):
        assert (backend.device_refusal(capability) == "") == runs
    machine(monkeypatch, (7, 5), (13, 0))
    assert backend.refusal().startswith("a GPU of compute capability 7.5 is not supported; kernels exist for sm_80, ")
    assert "compute capability 13.0" in backend.refusal()


def test_one_usable_card_among_others_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, (7, 5), (8, 6))
    assert backend.refusal() == ""


def a_layer() -> PackedLinear:
    return build(scheme_of(WEIGHTS[2], 4, 4, False), 8, 32)[0]


def test_asked_for_by_name_it_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setenv(registry.ENVIRONMENT, "triton")
    with pytest.raises(
        RuntimeError, match=r"'triton' was asked for and cannot run: PyTorch finds no usable NVIDIA GPU.*=auto"
    ):
        a_layer()(inputs(1, 2, 32))


def test_asked_for_by_name_on_the_cpu_it_says_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, (9, 0))
    monkeypatch.setenv(registry.ENVIRONMENT, "triton")
    with pytest.raises(RuntimeError, match="runs on cuda only, not on cpu"):
        a_layer().prepare_backend()


def on_gpu(*_: Any) -> Any:
    """Stands for a tensor on a GPU, where the registry asks for nothing but its device."""
    return type("OnGpu", (), {"device": torch.device("cuda")})()


def test_a_block_op_on_a_gpu_is_an_error_by_name_and_the_reference_without(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, triton=None)
    for name in ("layer_norm_modulate", "rms_norm_rotary", "add_gated"):
        monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
        assert registry.block_op(name, (on_gpu(),)) is registry.get("reference").block_ops[name].run
        monkeypatch.setenv(registry.ENVIRONMENT, "triton")
        with pytest.raises(RuntimeError, match="asks for kernels that cannot run: triton is not installed"):
            registry.block_op(name, (on_gpu(),))


def test_a_fallback_is_announced_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    machine(monkeypatch, triton=None)
    layer = a_layer()
    tensors = layer.weight_packed, layer.weight_scale, layer.weight_zero_point, layer.weight_row_sum
    monkeypatch.setattr(registry, "_serves", lambda one, _: one.name != "cpu")  # as on a GPU
    with caplog.at_level(logging.WARNING, registry.__name__):
        for _ in range(3):
            weight = registry.PackedWeight(*tensors, 32, layer.scheme.weights, layer.scheme.input_activations)
            assert registry.choose(weight).name == "reference"
    assert [r.getMessage() for r in caplog.records if "triton: triton is not installed" in r.getMessage()] == caplog.messages
    assert len(caplog.messages) == 1


def test_mixed_devices() -> None:
    layer = a_layer()
    layer.prepare_backend(registry.KernelPreference.REFERENCE)
    tensors = layer._tensors()
    with pytest.raises(ValueError, match=r"must be a dense tensor on cuda:0, as the input, not .* on cpu"):
        check_layer(tensors, torch.device("cuda:0"), quantized=True)
    check_layer(tensors, torch.device("cpu"), quantized=True)
    with pytest.raises(ValueError, match=r"the input is on cuda:0 and the layer on cpu: .*\.to\('cuda:0'\) for the layer"):
        check_layer(tensors, torch.device("cuda:0"), quantized=True)
    with pytest.raises(ValueError, match="y must be a dense tensor on meta"):
        x = torch.ones(1, 2, 8)
        block_ops.check_add_gated(x.to("meta"), x, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64])
def test_wrong_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"input must be float32, bfloat16 or float16 .*not {dtype}"):
        set_timestep(torch.tensor([500.0]))
        a_layer()(torch.ones(1, 2, 32).to(dtype))


def test_wrong_dtypes_of_a_layers_own_tensors() -> None:
    layer = a_layer()
    layer.prepare_backend(registry.KernelPreference.REFERENCE)
    tensors = layer._tensors()
    wrong: list[tuple[dict[str, torch.Tensor], str]] = [
        ({"weight_scale": tensors.weight_scale.double()}, "weight_scale must be float32"),
        ({"weight_row_sum": tensors.weight_row_sum.long()}, "weight_row_sum must be int32"),
    ]
    for changed, said in wrong:
        with pytest.raises(ValueError, match=said):
            check_layer(LayerTensors(**{**tensors._asdict(), **changed}), torch.device("cpu"), quantized=True)


@pytest.mark.parametrize(("dtype", "size", "said"), [(torch.float32, 64, "dtype=torch.bfloat16"), (torch.float16, 160, "160")])
def test_attention_in_8_bits_on_a_gpu(dtype: torch.dtype, size: int, said: str) -> None:
    q = torch.empty(1, 3, 2, size, dtype=dtype)
    assert said in launch.refusal(q) and not launch.takes(q, q, q)
    assert launch.takes(*[q[..., :64].half()] * 3) and not launch.takes(*[q[:, :0, :, :64].half()] * 3)
