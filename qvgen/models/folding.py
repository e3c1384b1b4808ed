"""Inputs of linear layers that can be shifted and scaled per channel for nothing.

A layer that reads x' = (x - shift) / scale, with weight W' = W diag(scale) and bias b' = b + W shift, computes what it
computed before. Where the step that makes x ends in an affine map per channel (a norm's weight and bias, the value
projection of an attention, a modulation table), x' costs nothing either: the same map with other numbers. Channels whose
means and widths differ waste most of a token's few levels; folded, they share them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn


class ChannelGrid(NamedTuple):
    """The fold of an input: it becomes (x - shift) / scale, both (K,)."""

    shift: torch.Tensor
    scale: torch.Tensor


# Changes the parameters that make x so that they make (x - shift) / scale; both (K,).
Fold = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class FoldableInput:
    """The input of the linear layers `layers` (full names); or the inputs of several blocks, if the same parameters make
    them. `shifts` is False if it can only be scaled, as is so for several inputs; `scales` is False if it can only be
    shifted."""

    layers: tuple[str, ...]
    fold: Fold
    scales: bool = True
    shifts: bool = True

    @property
    def name(self) -> str:
        """Distinct in a model: an input can be scaled with those of other blocks, and then shifted by itself."""
        return self.layers[0] if self.shifts else f"{self.layers[0]}:shared"


@torch.no_grad()
def fold_(model: nn.Module, source: FoldableInput, grid: ChannelGrid) -> None:
    """Shift and scale one input, in place; what the model computes stays the same up to rounding.

    Raises ValueError for a shift or a scale that the input cannot take, or a scale that is not positive.
    """
    shift, scale = grid
    if not (scale > 0).all():
        raise ValueError(f"the input of {source.layers[0]} needs positive scales")
    if not source.scales and not (scale == 1).all():
        raise ValueError(f"the input of {source.layers[0]} can be shifted, not scaled")
    if not source.shifts and not (shift == 0).all():
        raise ValueError(f"the inputs of {source.layers[0]} and others can be scaled, not shifted")
    layers: list[nn.Linear] = []
    for name in source.layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if layer.bias is None and source.shifts:
            raise ValueError(f"{name} has no bias to take the shift of its input")
        layers.append(layer)
    shift, scale = (part.to(layers[0].weight.device) for part in grid)
    source.fold(shift, scale)
    for layer in layers:
        if layer.bias is not None:
            layer.bias.add_(layer.weight @ shift)
        layer.weight.mul_(scale)


def affine_fold(weight: torch.Tensor, bias: torch.Tensor) -> Fold:
    """For x = (...) * weight + bias, per channel."""

    def fold(shift: torch.Tensor, scale: torch.Tensor) -> None:
        weight.div_(scale)
        bias.sub_(shift).div_(scale)

    return fold


def linear_fold(*linears: nn.Linear) -> Fold:
    """For x that `linears` make, each for tokens of its own. Also for the output projection of an attention, with the value
    projections: its input is a mean of values with weights that sum to 1, so what is done to every value is done to it."""

    def fold(shift: torch.Tensor, scale: torch.Tensor) -> None:
        for linear in linears:
            linear.weight.div_(scale[:, None])
            linear.bias.sub_(shift).div_(scale)

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


def shared_modulation_fold(linear: nn.Linear, rows: tuple[slice, slice], tables: Sequence[torch.Tensor]) -> Fold:
    """For x = (...) * (1 + s + t_s) + b + t_b in several blocks, where b and s are outputs of one `linear`, in `rows`, and t_b
    and t_s the rows of a block's own of `tables` (2, K): only one scale for all blocks can go into them."""
    offset, factor = rows

    def fold(shift: torch.Tensor, scale: torch.Tensor) -> None:
        for part in (offset, factor):
            linear.weight[part] /= scale[:, None]
            linear.bias[part] /= scale
        for table in tables:
            table[0] /= scale
            table[1] = (1 + table[1]) / scale - 1

    return fold


def shift_fold(table: torch.Tensor) -> Fold:
    """For x = (...) + table + (...): only a shift can go into the table."""

    def fold(shift: torch.Tensor, scale: torch.Tensor) -> None:
        table.sub_(shift)

    return fold


Side = tuple[str, str]  # the names of its modulation and of its feed-forward


def joint_block_inputs(
    model: nn.Module, sides: tuple[Side, Side] = (("norm1.linear", "ff"), ("norm1_context.linear", "ff_context"))
) -> list[FoldableInput]:
    """Of a transformer whose blocks read latents and text in one attention, each side modulated by a linear layer of its own
    (MMDiT: Flux, HunyuanVideo, Qwen-Image, Stable Diffusion 3), and of the single blocks behind them, which read both as one.
    Per block and side: the inputs of q, k and v and of the feed-forward; of both sides together that of the output
    projections, whose values are mixed; those of a second attention, of latents alone; per single block what q, k, v and the
    feed-forward read."""
    found = []
    for name, block in _blocks(model, "transformer_blocks"):
        for (modulation, feed_forward), projection in zip(sides, ("to_{}", "add_{}_proj"), strict=True):
            if getattr(block, feed_forward) is None:
                continue  # the last block of Stable Diffusion 3 makes no text
            linear = block.get_submodule(modulation)
            shift, scale, _, ff_shift, ff_scale, _, *second = _rows(linear)
            attention = tuple(f"{name}.attn.{projection.format(x)}" for x in "qkv")
            found += [
                FoldableInput(attention, modulation_fold(linear, [(shift, scale)])),
                FoldableInput((f"{name}.{feed_forward}.net.0.proj",), modulation_fold(linear, [(ff_shift, ff_scale)])),
            ]
            if second:
                attention = tuple(f"{name}.attn2.to_{x}" for x in "qkv")
                found.append(FoldableInput(attention, modulation_fold(linear, [(second[0], second[1])])))
                found.append(FoldableInput((f"{name}.attn2.to_out.0",), linear_fold(block.attn2.to_v)))
        outputs = [f"{name}.attn.to_out.0"] + ([] if block.attn.to_add_out is None else [f"{name}.attn.to_add_out"])
        found.append(FoldableInput(tuple(outputs), linear_fold(block.attn.to_v, block.attn.add_v_proj)))
    for name, block in _blocks(model, "single_transformer_blocks"):
        shift, scale, _ = _rows(block.norm.linear)
        layers = tuple(f"{name}.{layer}" for layer in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
        found.append(FoldableInput(layers, modulation_fold(block.norm.linear, [(shift, scale)])))
    return found


def _blocks(model: nn.Module, name: str) -> list[tuple[str, Any]]:
    return [(f"{name}.{i}", block) for i, block in getattr(model, name, nn.Module()).named_children()]


def _rows(linear: nn.Linear) -> list[slice]:
    """Where a modulation has its parts, as wide as what it reads: shift, scale and gate, once to three times."""
    width = linear.in_features
    return [slice(i, i + width) for i in range(0, linear.out_features, width)]


def ada_norm_single_inputs(model: nn.Module, modulation: nn.Linear) -> list[FoldableInput]:
    """Of a transformer whose blocks `modulation`, one projection of the timestep, modulates with tables of their own, and
    which reads text after a projection (PixArt, LTX-Video). Scaled for all blocks together: the inputs of self-attention's q,
    k and v, those of the feed-forward, and the text; per block a shift of the first two, and the inputs of the output
    projections."""
    parts: Any = model
    if not parts.config.attention_bias:
        return []  # a shift needs one
    blocks = list(parts.transformer_blocks)
    names = [f"transformer_blocks.{i}" for i in range(len(blocks))]
    text = tuple(f"{name}.attn2.to_{x}" for name in names for x in "kv")
    found = [FoldableInput(text, linear_fold(parts.caption_projection.linear_2))]
    attention = [tuple(f"{name}.attn1.to_{x}" for x in "qkv") for name in names]
    feed_forward = [(f"{name}.ff.net.0.proj",) for name in names]
    width = modulation.out_features // 6
    for read, first in ((attention, 0), (feed_forward, 3)):  # rows of a block's table: shift, scale, gate; twice
        offset, factor = (slice(row * width, (row + 1) * width) for row in (first, first + 1))
        tables = [block.scale_shift_table[first : first + 2] for block in blocks]
        fold = shared_modulation_fold(modulation, (offset, factor), tables)
        found.append(FoldableInput(sum(read, ()), fold, shifts=False))
        found += [
            FoldableInput(layers, shift_fold(table[0]), scales=False) for layers, table in zip(read, tables, strict=True)
        ]
    for name, block in zip(names, blocks, strict=True):
        for part in ("attn1", "attn2"):
            value = block.get_submodule(part).to_v
            found.append(FoldableInput((f"{name}.{part}.to_out.0",), linear_fold(value)))
    return found
