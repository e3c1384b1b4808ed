"""What a CUDA graph can record: a packed model's forward on tensors without values, where whatever a host could ask raises,
its kernels' launches written down instead of made. That a graph records it on a GPU: kernels/test_fused.py, on one."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="triton is not installed: pip install -e .[triton]")

from qvgen.integrations.fused import fuse_
from qvgen.kernels import block_ops, direct, registry
from qvgen.kernels.registry import BlockOp
from qvgen.kernels.triton import configurations
from qvgen.kernels.triton.backend import TritonBackend
from qvgen.models import cogvideox, wan
from qvgen.nn.packed_linear import PackedLinear
from qvgen.nn.swap import convert_, prepare_
from qvgen.quant.scheme import QuantScheme
from tests.support.offline_triton import Launch, recorded

KERNELS = {"quantize_tokens_kernel", "unpack_kernel", "integer_gemm_kernel"}
CASES = {
    "wan": (wan.tiny_transformer, (2, 4, 3, 4, 4), {"rms_norm_rotary_kernel"}),
    "cogvideox": (cogvideox.tiny_transformer, (2, 3, 4, 4, 4), {"layer_norm_modulate_kernel", "add_gated_kernel"}),
}
TARGETS = {"wan": wan.WanFamily.default_targets, "cogvideox": cogvideox.CogVideoXFamily.default_targets}


class WithoutValues(TritonBackend):
    devices = ("meta",)

    def __init__(self) -> None:
        self.block_ops: Mapping[str, BlockOp] = {
            name: op._replace(missing=lambda: "") for name, op in TritonBackend.block_ops.items()
        }

    def available(self) -> str:
        return ""


class OnOneDevice(TorchDispatchMode):
    """Raises where a tensor is copied between host and device, which a graph cannot record and which waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                raise AssertionError(f"{func} handles a tensor on {tensor.device}")
        return result


@pytest.fixture(autouse=True)
def _without_values(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    registry.register(WithoutValues())
    monkeypatch.setattr(configurations, "tokens_together", lambda *_: 16)  # blocks, as a large model has them
    for module in (block_ops, direct):  # into the ops, whose fakes would stand for them
        monkeypatch.setattr(module, "nobody_watches", lambda _: True)
    yield


def packed(family: str) -> Any:
    model = CASES[family][0]().eval()
    prepare_(model, QuantScheme(timestep_groups=4), default_targets=TARGETS[family])
    convert_(model)
    assert fuse_(model) == 2
    return model.to("meta")


def facts(launches: list[Launch]) -> list[Any]:
    """What decides which code runs: kernels, constants and whole numbers."""
    return [
        (one.kernel.__name__, {k: v for k, v in one.arguments.items() if not isinstance(v, Tensor)}, one.options)
        for one in launches
    ]


@torch.no_grad()
@pytest.mark.parametrize("family", CASES)
def test_a_forward_asks_the_host_nothing_and_is_the_same_each_time(family: str) -> None:
    model, (_, latents, between) = packed(family), CASES[family]
    sizes = {"hidden_states": latents, "timestep": (2,), "encoder_hidden_states": (2, 8, 16)}
    inputs = {name: torch.empty(size, device="meta") for name, size in sizes.items()}
    with recorded() as first:
        model(**inputs)  # repacks the weights
    assert {layer.backend for layer in model.modules() if isinstance(layer, PackedLinear)} == {"triton"}
    with recorded() as second, OnOneDevice():
        model(**inputs)
    assert facts(second) == facts(first)
    names = {one.kernel.__name__ for one in second}
    assert names == KERNELS | between


@pytest.mark.parametrize(
    "asking", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x.cpu(), lambda x: x + torch.tensor([1.0])]
)
def test_what_asks_the_host_is_noticed(asking: Any) -> None:
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), OnOneDevice():
        asking(torch.empty(4, device="meta"))
