"""Micro-batches, checkpointing and mixed precision: less memory, the same training."""

from pathlib import Path

import pytest
import torch
from torch import nn

from qvgen.checkpoint.pipeline import load_transformer
from qvgen.models.tiny import tiny_pipeline
from qvgen.params import Params
from tests.integration.test_training import FAMILIES, settings, trainer

# Of the gradients to those of float32: least cosine of a tensor, and of all tensors together. Measured: 0.93 and 0.993.
LEAST_COSINE, WHOLE_COSINE = 0.8, 0.97
# Of the first loss. With Φ it is so small on these models that the rounding of the outputs is a tenth of it (measured).
FIRST_LOSS = 0.25


def with_compute(params: Params, **compute: object) -> Params:
    return params.model_copy(update={"compute": params.compute.model_copy(update=compute)})


def gradients(name: str, params: Params) -> tuple[float, dict[str, torch.Tensor]]:
    run = trainer(name, params)
    run.student.train()
    loss = run._backward(run.batches[0]).item()
    return loss, {n: p.grad for n, p in run.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_micro_batches_add_up(name: str) -> None:
    params = settings(batch_size=4)
    loss, whole = gradients(name, params)
    for size in (1, 2, 4):
        found, parts = gradients(name, with_compute(params, micro_batch=size))
        assert found == pytest.approx(loss, rel=1e-5) and parts.keys() == whole.keys()
        for parameter, gradient in whole.items():
            # Codes are the same; sums are added up in another order.
            torch.testing.assert_close(parts[parameter], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    loss, whole = gradients(name, settings())
    found, again = gradients(name, with_compute(settings(), checkpointing=True))
    assert found == loss
    assert [n for n in whole if not torch.equal(whole[n], again[n])] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_mixed_precision_keeps_weights_and_quantizers_in_float32(name: str) -> None:
    """The whole of a short training, with the other two knobs on."""
    params = with_compute(settings(batch_size=4, precision="bfloat16"), micro_batch=2, checkpointing=True)
    run, losses = trainer(name, params), []
    run.teacher.to(torch.bfloat16)
    run.run(params.schedule.total_steps, lambda _, record: losses.append(record.loss))
    assert {p.dtype for p in run.student.parameters()} == {torch.float32}
    assert {t.dtype for s in run.optimizer.state.values() for t in s.values()} == {torch.float32}
    exact, expected = trainer(name, settings(batch_size=4)), []
    exact.run(1, lambda _, record: expected.append(record.loss))
    assert losses[0] == pytest.approx(expected[0], rel=FIRST_LOSS)
    assert not run.finish().is_gradient_checkpointing


@pytest.mark.parametrize("name", FAMILIES)
def test_a_teacher_loaded_in_bfloat16(name: str, tmp_path: Path) -> None:
    """As stages load it: diffusers keeps some of its parameters in float32, which says nothing of its inputs."""
    family, _, rotary = name.partition("-")
    tiny_pipeline(family, tmp_path / "model", **({"rotary": True} if rotary else {}))
    run = trainer(name, settings(precision="bfloat16"))
    run.teacher = load_transformer(tmp_path / "model", torch.bfloat16)
    run.run(1)


def test_gradients_of_mixed_precision_point_where_those_of_float32_do() -> None:
    _, exact = gradients("wan", settings())
    _, mixed = gradients("wan", settings(precision="bfloat16"))
    cosine = {n: nn.functional.cosine_similarity(exact[n].flatten(), mixed[n].flatten(), dim=0).item() for n in exact}
    large = [n for n in exact if exact[n].norm() > 1e-3 * max(g.norm() for g in exact.values())]
    assert min(cosine[n] for n in large) > LEAST_COSINE
    together = [torch.cat([g[n].flatten() for n in exact]) for g in (exact, mixed)]
    whole = nn.functional.cosine_similarity(*together, dim=0).item()
    assert whole > WHOLE_COSINE
