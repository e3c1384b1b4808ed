"""Inputs of linear layers that can be shifted and scaled per channel for nothing.

A layer that reads x' = (x - shift) / scale, with weight W' = W diag(scale) and bias b' = b + W shift, computes what it
computed before. Where the step that makes x ends in an affine map per channel (a norm's weight and bias, the value
projection of an attention, a modulation table), x' costs nothing either: the same map with other numbers. Channels whose
means and widths differ waste most of a token's few levels; folded, they share them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn


class ChannelGrid(NamedTuple):
    """What an input becomes: (x - shift) / scale, both (K,)."""

    shift: torch.Tensor
    scale: torch.Tensor


# Changes the parameters that make x so that they make (x - shift) / scale; both (K,).
Fold = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class FoldableInput:
    """An input shared by the linear layers `layers` (full names). `scales`: False if it can only be shifted."""

    layers: tuple[str, ...]
    fold: Fold
    scales: bool


@torch.no_grad()
def fold_(model: nn.Module, source: FoldableInput, grid: ChannelGrid) -> None:
    """Shift and scale one input, in place; what the model computes stays the same up to rounding.

    Raises ValueError for a scale that the input cannot take, or that is not positive.
    """
    shift, scale = grid
    if not (scale > 0).all():
        raise ValueError(f"the input of {source.layers[0]} needs positive scales")
    if not source.scales and not (scale == 1).all():
        raise ValueError(f"the input of {source.layers[0]} can be shifted, not scaled")
    layers: list[nn.Linear] = []
    for name in source.layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if layer.bias is None:
            raise ValueError(f"{name} has no bias to take the shift of its input")
        layers.append(layer)
    source.fold(shift, scale)
    for layer in layers:
        layer.bias.add_(layer.weight @ shift)
        layer.weight.mul_(scale)


def affine_fold(weight: torch.Tensor, bias: torch.Tensor) -> Fold:
    """For x = (...) * weight + bias, per channel."""

    def fold(shift: torch.Tensor, scale: torch.Tensor) -> None:
        weight.div_(scale)
        bias.sub_(shift).div_(scale)

    return fold


def value_fold(value: nn.Linear) -> Fold:
    """For the output projection of an attention: its input is a mean of values with weights that sum to 1, so what is
    done to every value is done to it."""

    def fold(shift: torch.Tensor, scale: torch.Tensor) -> None:
        value.weight.div_(scale[:, None])
        value.bias.sub_(shift).div_(scale)

    return fold


def modulation_fold(linear: nn.Linear, rows: Sequence[tuple[slice, slice]]) -> Fold:
    """For x = (...) * (1 + s) + b where s and b are outputs of `linear`; `rows` are pairs of where it has b and where s."""

    def fold(shift: torch.Tensor, scale: torch.Tensor) -> None:
        for offset, factor in rows:
            linear.weight[offset] /= scale[:, None]
            linear.bias[offset] = (linear.bias[offset] - shift) / scale
            linear.weight[factor] /= scale[:, None]
            linear.bias[factor] = (linear.bias[factor] + 1) / scale - 1

    return fold


def shift_fold(table: torch.Tensor) -> Fold:
    """For x = (...) + table + (...): only a shift can go into the table."""

    def fold(shift: torch.Tensor, scale: torch.Tensor) -> None:
        table.sub_(shift)

    return fold
