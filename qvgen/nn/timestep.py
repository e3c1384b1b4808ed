"""How the timestep reaches the activation quantizers: as state of the running call, kept by the thread that runs it.

A quantized layer needs the timestep group of each sample, and its caller, a transformer block, does not pass it on. The
model's forward pre-hook puts it where the layers of this thread find it, its forward hook restores what was there before. So
callers in other threads never meet, a call inside a call has its own timestep, layers may belong to several models, and a
diffusers pipeline needs no change. Thread-local instead of a context variable, because torch.compile traces the one and not
the other; a forward never awaits, so within it the two are the same.

Activation checkpointing runs layers again in the backward pass, when the call is over: `carry_timestep` gives it back to them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qvgen.models.registry import max_timestep
from qvgen.quant.primitives import NUM_TRAIN_TIMESTEPS, timestep_group

_GROUPS, _LARGEST = "qvgen_timestep_groups", "qvgen_max_timestep"
# Where diffusers' models and torch's CheckpointWrapper keep the function that checkpoints: checkpoint(function, *arguments).
_CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")


class _Call:
    """One running forward: its `timestep` (n,) or (1,), and the timestep `group` of each for models with `groups` of them."""

    def __init__(self, timestep: torch.Tensor, groups: int, outer: _Call | None) -> None:
        self.timestep, self.groups, self.outer = timestep, groups, outer
        self.group = timestep_group(timestep, groups, NUM_TRAIN_TIMESTEPS)


class _Running:
    call: _Call | None = None


class _Thread(threading.local):
    def __init__(self) -> None:  # once in each thread
        self.running = _Running()  # an object between, because torch.compile loses what is assigned to a thread-local one


_thread = _Thread()


def group_of(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Timestep group of each sample of `x` (n, ..., K), of `groups`, as (n,) or (1,) int64. Raises RuntimeError when the
    timestep of this call is not known."""
    if groups == 1:
        return torch.zeros(1, dtype=torch.int64, device=x.device)
    call = _thread.running.call
    if call is None:
        raise RuntimeError(
            "the timestep of this call is not known: call the whole transformer, or set_timestep(t) before a layer of it; "
            "what runs layers again later, such as checkpointing, needs carry_timestep(function)"
        )
    group = call.group if call.groups == groups else timestep_group(call.timestep, groups, NUM_TRAIN_TIMESTEPS)
    if group.shape[0] not in (1, x.shape[0]):
        raise RuntimeError(f"{group.shape[0]} timesteps were given for an input of {x.shape[0]} samples")
    return group if group.device == x.device else group.to(x.device)


def set_timestep(timestep: torch.Tensor | None) -> None:
    """Set the timestep (0 to 1000) of each sample for layers that this thread calls outside a model's forward, until it is
    set again; None forgets it."""
    _thread.running.call = None if timestep is None else _Call(_per_sample(timestep), 1, None)


def carry_timestep(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as it would run in the current call, whenever and in whatever thread it runs."""
    return _Carried(function, _thread.running.call)


def track_timestep(model: nn.Module, groups: int, largest: float | None = None) -> None:
    """Let each forward of `model` tell its layers the timestep, from its argument `timestep`, which is between 0 and `largest`
    (None: as the family of its class says); with one group there is nothing to tell."""
    tracked = getattr(model, _GROUPS, 1) > 1
    setattr(model, _GROUPS, groups)
    setattr(model, _LARGEST, largest_timestep(model) if largest is None else largest)
    if groups > 1 and not tracked:
        model.register_forward_pre_hook(_enter, with_kwargs=True)
        model.register_forward_hook(_leave, always_call=True)


def _enter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # Wan takes the timestep as its second argument and CogVideoX as its third; by keyword both are called alike, as every
    # diffusers pipeline does.
    timestep, outer = kwargs.get("timestep"), _thread.running.call
    if timestep is None and outer is None:
        raise TypeError("call a quantized transformer with timestep=... as a keyword: its quantizers need it")
    timestep = outer.timestep if timestep is None and outer is not None else timestep_of(model, timestep)
    _thread.running.call = _Call(timestep, getattr(model, _GROUPS), outer)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _carry_through_checkpoints(model)


def _leave(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    call = _thread.running.call
    if call is not None:  # None: _enter itself raised
        _thread.running.call = call.outer


def largest_timestep(model: nn.Module) -> float:
    """That a transformer is called with, for pure noise: 1000, of some (Flux) 1."""
    return getattr(model, _LARGEST, None) or max_timestep(type(model).__name__)


def timestep_of(model: nn.Module, timestep: Any) -> torch.Tensor:
    """Timesteps (n,) or (1,) between 0 and 1000 of what `model` is called with."""
    timestep, largest = _per_sample(timestep), largest_timestep(model)
    # In the dtype that it is given in: 0.7 in float32, a little less than 0.7, becomes 700 again.
    return timestep if largest == NUM_TRAIN_TIMESTEPS else timestep * (NUM_TRAIN_TIMESTEPS / largest)


def _per_sample(timestep: Any) -> torch.Tensor:
    """`timestep` is (), (n,) or, for models with one timestep per token (Wan 2.2 5B), (n, tokens): there the largest one
    counts, that of every token but those of a first frame that stays clean."""
    timestep = timestep.detach()
    return (timestep.amax(dim=1) if timestep.ndim == 2 else timestep).reshape(-1)


class _Carried:
    def __init__(self, function: Callable[..., Any], call: _Call | None) -> None:
        self.function, self.call = function, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outer, _thread.running.call = _thread.running.call, self.call
        try:
            return self.function(*args, **kwargs)
        finally:
            _thread.running.call = outer


class _CarryingCheckpoint:
    """A checkpointing function whose recomputation knows the timestep. torch.compile recomputes its own graph, where the
    timestep is an input already."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(function if torch.compiler.is_compiling() else carry_timestep(function), *args, **kwargs)


def _carry_through_checkpoints(model: nn.Module) -> None:
    for module in model.modules():
        for name in _CHECKPOINTS:
            checkpoint = module.__dict__.get(name)
            if callable(checkpoint) and not isinstance(checkpoint, _CarryingCheckpoint):
                setattr(module, name, _CarryingCheckpoint(checkpoint))
