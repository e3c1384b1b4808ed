"""The timestep belongs to the call: between models, threads, copies, and where layers run again."""

import asyncio
import copy
import dataclasses
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.utils.checkpoint import checkpoint

from qvgen.models.cogvideox import tiny_transformer as tiny_cogvideox_transformer
from qvgen.models.wan import tiny_transformer as tiny_wan_transformer
from qvgen.nn.swap import convert_, prepare_
from qvgen.nn.timestep import carry_timestep, group_of, set_timestep, timestep_of, track_timestep
from qvgen.quant.grid import LayerGrid
from qvgen.quant.primitives import timestep_group
from qvgen.quant.scheme import QuantScheme

GROUPS = 10
SCHEME = QuantScheme(timestep_groups=GROUPS)
EARLY, LATE = torch.tensor([50.0]), torch.tensor([950.0])


class Model(nn.Module):
    """Two linear layers behind a timestep."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), inner or nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def grids(model: nn.Module, names: list[str]) -> dict[str, LayerGrid]:
    """Grids whose clips differ from one timestep group to the next."""
    result = {}
    for name in names:
        grid = LayerGrid.min_max(model.get_submodule(name).weight, SCHEME)
        clips = torch.linspace(0.3, 0.95, GROUPS)
        result[name] = dataclasses.replace(grid, clip_lower=clips, clip_upper=clips.flip(0))
    return result


def quantized(model: nn.Module, packed: bool = True) -> Any:
    names = prepare_(copy.deepcopy(model), SCHEME)
    prepare_(model, SCHEME, grids=grids(model, names))
    if packed:
        convert_(model)
    return model.eval()


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return quantized(Model())


X = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1))


def test_the_timestep_matters() -> None:
    assert not torch.equal(model()(X, timestep=EARLY), model()(X, timestep=LATE))


def test_a_model_that_is_called_with_fractions() -> None:
    """Every whole timestep is in the group that training put it into (but for 500 and 1,000 groups, LOG.md)."""
    whole, fractions = model(), model()
    track_timestep(fractions, GROUPS, largest=1.0)
    t = torch.arange(1001.0)
    for groups in (10, 50, 100):
        given, meant = (timestep_group(each, groups, 1000) for each in (timestep_of(fractions, t / 1000), t))
        assert torch.equal(given, meant)
    for t in (EARLY, LATE):
        assert torch.equal(fractions(X, timestep=t / 1000), whole(X, timestep=t))


def test_nothing_is_left_after_a_call_or_a_failed_one() -> None:
    quantized_ = model()
    quantized_(X, timestep=EARLY)
    with pytest.raises(RuntimeError, match="timestep of this call is not known"):
        quantized_.first(X)
    with pytest.raises(ValueError, match="input has 15 features"):
        quantized_(X[..., :15], timestep=EARLY)
    with pytest.raises(RuntimeError, match="timestep of this call is not known"):
        quantized_.first(X)
    with pytest.raises(TypeError, match="call a quantized transformer with timestep="):
        quantized_(X, EARLY)


def test_a_call_inside_a_call_has_its_own_timestep() -> None:
    class Nested(Model):
        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            before = self.first(x)
            inner(x, timestep=LATE)
            assert torch.equal(self.first(x), before)
            return super().forward(x, timestep)

    inner = model()
    outer = model()
    outer.__class__ = Nested
    assert torch.equal(outer(X, timestep=EARLY), inner(X, timestep=EARLY))


def test_models_that_share_a_layer() -> None:
    one, other = model(), model(seed=1)
    one.second = other.second
    expected = [m(X, timestep=t) for m, t in ((one, EARLY), (other, LATE))]
    for _ in range(2):
        assert torch.equal(other(X, timestep=LATE), expected[1])
        assert torch.equal(one(X, timestep=EARLY), expected[0])


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_independent(again: Any) -> None:
    quantized_ = model()
    expected = quantized_(X, timestep=EARLY)
    twin = again(quantized_)
    twin(X, timestep=LATE)
    assert torch.equal(twin(X, timestep=EARLY), expected)
    assert torch.equal(quantized_(X, timestep=EARLY), expected)


def test_executors_of_asyncio() -> None:
    quantized_ = model()
    timesteps = [torch.tensor([float(t)]) for t in range(20, 1000, 50)]
    expected = [quantized_(X, timestep=t) for t in timesteps]

    async def all_at_once() -> list[torch.Tensor]:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(4) as pool:
            calls = [loop.run_in_executor(pool, lambda t=t: quantized_(X, timestep=t)) for t in timesteps]
            calls += [asyncio.to_thread(quantized_, X, timestep=t) for t in timesteps]  # type: ignore[misc]
            return await asyncio.gather(*calls)

    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(asyncio.run(all_at_once()), expected * 2, strict=True))


def test_one_group_needs_no_timestep() -> None:
    sequence = nn.Sequential(nn.Linear(16, 8))
    prepare_(sequence, QuantScheme(timestep_groups=1))
    trained = sequence(X)
    convert_(sequence)
    torch.testing.assert_close(sequence(X), trained)
    assert not sequence._forward_pre_hooks and not sequence._forward_hooks


def test_layers_alone_take_the_timestep_that_was_set() -> None:
    sequence = quantized(nn.Sequential(nn.Linear(16, 8)))
    with pytest.raises(TypeError, match="timestep"):
        sequence(X)
    set_timestep(EARLY)
    try:
        assert torch.equal(sequence(X), sequence[0](X))
        assert group_of(X, GROUPS).tolist() == [0]
        assert group_of(X, 100).tolist() == [5]
        set_timestep(torch.tensor([10.0, 20.0]))
        with pytest.raises(RuntimeError, match="2 timesteps were given for an input of 3 samples"):
            sequence[0](X.expand(3, -1, -1))
    finally:
        set_timestep(None)


def test_more_groups_than_at_first() -> None:
    sequence = nn.Sequential(nn.Linear(16, 8))
    track_timestep(sequence, 1)
    track_timestep(sequence, GROUPS)
    track_timestep(sequence, GROUPS)
    assert len(sequence._forward_pre_hooks) == len(sequence._forward_hooks) == 1


def gradients(trained: nn.Module, calls: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Gradients of all calls, made before any backward pass."""
    trained.zero_grad()
    total = sum(trained(**call, return_dict=False)[0].square().sum() for call in calls)
    assert isinstance(total, torch.Tensor)
    total.backward()
    return [p.grad.clone() for p in trained.parameters() if p.grad is not None]


def diffusion_calls(family: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    shape = (1, 4, 3, 4, 4) if family == "wan" else (1, 3, 4, 4, 4)
    return [
        {
            "hidden_states": torch.randn(shape, generator=generator),
            "timestep": timestep,
            "encoder_hidden_states": torch.randn(1, 8, 16, generator=generator),
        }
        for timestep in (EARLY, LATE)
    ]


@pytest.mark.parametrize("by_hand", [False, True], ids=["diffusers", "by hand"])
@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_checkpointing_recomputes_with_the_timestep_of_its_call(family: str, by_hand: bool) -> None:
    trained = quantized(tiny_wan_transformer() if family == "wan" else tiny_cogvideox_transformer(), packed=False)
    calls = diffusion_calls(family)
    expected = gradients(trained, calls)
    if by_hand:
        trained.enable_gradient_checkpointing(lambda block, *args: checkpoint(block, *args, use_reentrant=False))
    else:
        trained.enable_gradient_checkpointing()
    trained.train()
    found = gradients(trained, calls)
    assert len(expected) == len(found) > 50
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_wrapped_blocks_recompute_with_the_timestep_of_their_call() -> None:
    torch.manual_seed(0)
    trained = quantized(Model(), packed=False)

    def gradient() -> torch.Tensor:
        x = X.clone().requires_grad_()
        total = sum(trained(x, timestep=t).square().sum() for t in (EARLY, LATE))
        assert isinstance(total, torch.Tensor)
        total.backward()
        assert x.grad is not None
        return x.grad

    expected = gradient()
    trained.second = CheckpointWrapper(trained.second)
    assert torch.equal(gradient(), expected)


def test_what_runs_later_is_refused_unless_it_carries_the_timestep() -> None:
    quantized_ = model()
    later = []

    class Recording(Model):
        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            later[:] = [lambda: self.first(x), carry_timestep(self.first)]
            return self.first(x)

    quantized_.__class__ = Recording
    expected = quantized_(X, timestep=LATE)
    with pytest.raises(RuntimeError, match="needs carry_timestep"):
        later[0]()
    assert torch.equal(later[1](X), expected)
