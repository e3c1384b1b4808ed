"""docs/add-a-kernel-backend.md, done: a backend that counts its calls."""

from collections.abc import Iterator

import pytest
import torch

from qvgen.kernels import registry
from qvgen.kernels.reference import ReferenceBackend
from qvgen.kernels.registry import KernelPreference
from qvgen.quant.scheme import QuantScheme
from tests.support.packed_reference import build


class Counting(ReferenceBackend):
    """The reference under another name, which has a placeholder until its kernels are written."""

    name = "triton"
    calls = 0

    def linear(self, *args, **named) -> None:
        type(self).calls += 1
        super().linear(*args, **named)


@pytest.fixture
def backend() -> Iterator[Counting]:
    before = dict(registry._backends)
    registry.register(backend := Counting())
    yield backend
    registry._backends.clear()
    registry._backends.update(before)


def test_a_registered_backend_runs_layers_and_is_explained(backend: Counting) -> None:
    layer, reference = (build(QuantScheme(timestep_groups=1), 8, 32)[0] for _ in range(2))
    layer.prepare_backend(KernelPreference.TRITON)
    reference.prepare_backend(KernelPreference.REFERENCE)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(layer(x), reference(x))
    assert layer.backend == "triton" and backend.calls == 1
    assert any(row.op == registry.OP and row.backend == "triton" and row.available for row in registry.explain())
