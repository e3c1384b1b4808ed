"""Module swap: `prepare_` turns linear layers into QATLinear, `convert_` turns those into packed layers; both in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from qvgen.nn.input_transform import InputTransform
from qvgen.nn.packed_linear import PackedLinear
from qvgen.nn.qat_linear import QATLinear
from qvgen.nn.targets import match_linears, replace_module
from qvgen.nn.timestep import track_timestep
from qvgen.phi.rank_decay import RankState
from qvgen.quant.fake_quantizer import ActivationQuantizer, WeightQuantizer
from qvgen.quant.grid import LayerGrid
from qvgen.quant.scheme import QuantScheme


def prepare_(
    model: nn.Module,
    scheme: QuantScheme,
    *,
    default_targets: Sequence[str] = ("Linear",),
    grids: Mapping[str, LayerGrid] | None = None,
) -> list[str]:
    """Replace the targeted linear layers by QATLinear and return their names.

    `grids` holds the calibrated quantizers per layer; without it every layer gets its whole min/max range. Where the scheme
    scales or rotates inputs, or has a low-rank branch, the layer's weight becomes what these leave of it. A layer that stands
    in several places becomes one QATLinear in all of them. Raises ValueError if a pattern matches nothing, or a layer has no
    calibrated grid or that of another scheme.
    """
    names = match_linears(model, scheme.targets, scheme.ignore, default_targets)
    if grids is not None and (missing := [n for n in names if n not in grids]):
        raise ValueError(f"{len(missing)} layers were not calibrated, such as {missing[0]}; run calibration with this scheme")
    track_timestep(model, scheme.timestep_groups)
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        grid = LayerGrid.min_max(linear.weight, scheme) if grids is None else grids[name].to(linear.weight.device)
        grid.check(name, linear.weight, scheme)
        weight_quantizer = WeightQuantizer(scheme.weights, grid.scale, grid.zero_point)
        input_quantizer = None
        if scheme.input_activations is not None:
            assert grid.clip_lower is not None and grid.clip_upper is not None
            input_quantizer = ActivationQuantizer(scheme.input_activations, grid.clip_lower, grid.clip_upper)
        layer = QATLinear(linear, scheme, weight_quantizer, input_quantizer)
        if scheme.extras:
            # A new parameter: a copy of the model, such as the teacher, may share the old one.
            layer.weight = nn.Parameter(grid.residual(linear.weight, scheme).to(linear.weight.dtype))
            layer.input_transform = InputTransform(grid, scheme)
        replace_module(model, name, layer)
    return names


def qat_layers(model: nn.Module) -> Iterator[tuple[str, QATLinear]]:
    """Names and layers that `prepare_` made; one that stands in several places once, by the first name."""
    for name, module in model.named_modules():
        if isinstance(module, QATLinear):
            yield name, module


def convert_(model: nn.Module) -> list[str]:
    """Replace every QATLinear by a PackedLinear and return their names. Raises ValueError while any Φ is active."""
    layers = list(qat_layers(model))
    if not layers:
        raise ValueError("nothing to convert: the model has no QATLinear; call prepare_ first")
    if active := [name for name, layer in layers if layer.phi is not None and layer.phi.rank > 0]:
        raise ValueError(
            f"Φ is still active in {len(active)} layers, such as {active[0]}: finish rank decay (rank 0) before packing"
        )
    if unmerged := [name for name, layer in layers if layer.adapter is not None]:
        raise ValueError(f"{len(unmerged)} layers have adapters, such as {unmerged[0]}: call merge_adapters_ before packing")
    for name, layer in layers:
        scale, zero_point = layer.weight_quantizer.export()
        clips = (None, None) if layer.input_quantizer is None else layer.input_quantizer.export()
        packed = PackedLinear.from_codes(
            layer.weight_quantizer.codes(layer.weight),
            scale,
            zero_point,
            *clips,
            None if layer.bias is None else layer.bias.detach(),
            layer.scheme,
            **({} if layer.input_transform is None else layer.input_transform.export()),
        )
        replace_module(model, name, packed)
    return [name for name, _ in layers]


def add_phi_(model: nn.Module, rank: int, zero: torch.Generator | None = None) -> None:
    """Attach Φ of `rank` to every QATLinear, from its weight error, or at zero if there is a generator."""
    for _, layer in qat_layers(model):
        layer.add_phi(rank, zero)


def add_adapters_(model: nn.Module, generator: torch.Generator) -> None:
    """Attach a low-rank adapter to every QATLinear, and freeze all of the model but adapters and quantizers."""
    model.requires_grad_(False)
    for _, layer in qat_layers(model):
        layer.add_adapter(generator)
        for part in (layer.adapter, layer.weight_quantizer, layer.input_quantizer):
            if part is not None:
                part.requires_grad_(True)


def merge_adapters_(model: nn.Module) -> None:
    """Merge every adapter into its weight."""
    for _, layer in qat_layers(model):
        layer.merge_adapter()


def freeze_zero_points_(model: nn.Module) -> None:
    """Leave the weights' zero points where they are: only steps are learned."""
    for _, layer in qat_layers(model):
        if layer.weight_quantizer.zero_point is not None:
            layer.weight_quantizer.zero_point.requires_grad_(False)


def set_phi_(
    model: nn.Module,
    state: RankState,
    redecompose: bool = True,
    agree: Callable[[Sequence[torch.Tensor]], None] = lambda factors: None,
) -> dict[nn.Parameter, nn.Parameter | None]:
    """Bring every Φ to the rank and γ of a schedule's state. Returns the factors that were replaced, with the new ones.
    `agree` makes new factors of several processes the same, in place."""
    replaced: dict[nn.Parameter, nn.Parameter | None] = {}
    gamma: torch.Tensor | None = None  # sent to the device once for all layers
    for _, layer in qat_layers(model):
        phi = layer.phi
        if phi is None:
            continue
        if phi.rank > state.rank:
            replaced |= phi.truncate(state.rank, redecompose, agree)
        gamma = phi.gamma.new_tensor(state.gamma) if gamma is None else gamma
        phi.gamma[: phi.rank].copy_(gamma[: phi.rank])
        if state.rank == 0:
            layer.phi = None
    return replaced
