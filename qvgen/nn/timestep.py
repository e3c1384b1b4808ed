"""How the timestep reaches the activation quantizers: one explicit state per model, set once per forward call.

The layers of a model share one `TimestepState`. The transformer's forward pre-hook fills it from the `timestep` argument,
so a diffusers pipeline needs no change; `set_timestep` fills it by hand when layers are called on their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qvgen.quant.primitives import timestep_group

NUM_TRAIN_TIMESTEPS = 1000
_STATE = "qvgen_timestep"


class TimestepState:
    """Timestep group of each sample of the current call: `group` (n,) int64, or (1,) for all samples."""

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self.group: torch.Tensor | None = None

    def set(self, timestep: torch.Tensor) -> None:
        """`timestep` is (), (n,) or, for models with one timestep per token (Wan 2.2 5B), (n, tokens): there the largest
        one counts, which in text-to-video is that of every token."""
        if timestep.ndim == 2:
            timestep = timestep.amax(dim=1)
        self.group = timestep_group(timestep.detach().reshape(-1), self.groups, NUM_TRAIN_TIMESTEPS)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Group of each sample of `x` (n, ..., K) as (n,) or (1,). Raises RuntimeError when it is not known."""
        if self.groups == 1:
            return torch.zeros(1, dtype=torch.int64, device=x.device)
        if self.group is None:
            raise RuntimeError("the timestep of this call is not known: call the whole transformer, or set_timestep(model, t)")
        if len(self.group) not in (1, x.shape[0]):
            raise RuntimeError(f"{len(self.group)} timesteps were given for an input of {x.shape[0]} samples")
        return self.group.to(x.device)


def track_timestep(model: nn.Module, groups: int) -> TimestepState:
    """Give `model` a timestep state that every forward call refreshes. Returns it, for the layers to share."""
    state = TimestepState(groups)
    if not hasattr(model, _STATE):
        model.register_forward_pre_hook(_read_timestep, with_kwargs=True)
    setattr(model, _STATE, state)
    return state


def set_timestep(model: nn.Module, timestep: torch.Tensor) -> None:
    """Set the timestep (0 to 1000) of each sample for layers called outside `model.forward`."""
    getattr(model, _STATE).set(timestep)


def _read_timestep(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # Looked up on the module, not captured, so that a deep copy of the model uses its own state. Wan takes the timestep as
    # its second argument and CogVideoX as its third; by keyword both are called alike, as every diffusers pipeline does.
    timestep = kwargs.get("timestep")
    if timestep is None:
        raise TypeError("call a quantized transformer with timestep=... as a keyword: its quantizers need it")
    getattr(model, _STATE).set(timestep)
