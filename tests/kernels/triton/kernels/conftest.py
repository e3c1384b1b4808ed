"""The backend that these tests run: on the GPU, or interpreted on the CPU."""

import os
from collections.abc import Iterator, Mapping

import pytest

from qvgen.kernels import registry
from qvgen.kernels.registry import BlockOp
from qvgen.kernels.triton.backend import TritonBackend

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


class Interpreted(TritonBackend):
    devices = ("cpu",)

    def __init__(self) -> None:
        self.block_ops: Mapping[str, BlockOp] = {
            name: op._replace(missing=lambda: "") for name, op in TritonBackend.block_ops.items()
        }

    def available(self) -> str:
        return ""


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    if DEVICE == "cpu":
        registry.register(Interpreted())
    yield
