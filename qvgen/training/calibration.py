"""Calibration, before the first training step: record the inputs of every layer, fold those that can be folded, search the
grids. Functions stand in the order of their use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from qvgen.data.latents import LatentDataset
from qvgen.methods.method import Method
from qvgen.methods.registry import METHODS
from qvgen.models.family import Family
from qvgen.models.folding import ChannelGrid, fold_
from qvgen.nn.targets import match_linears
from qvgen.params import Params
from qvgen.quant.grid import LayerGrid
from qvgen.quant.primitives import NUM_TRAIN_TIMESTEPS, timestep_group
from qvgen.training.recorder import InputRecorder

Inputs = dict[str, list[torch.Tensor]]  # layer -> recorded rows (m, K) per timestep group
Progress = Callable[..., AbstractContextManager[Any]]  # (total, description, unit=...) opens a bar that has `update(n)`


@dataclass(frozen=True)
class Calibration:
    """The result of calibration, from which training starts. `inputs` are recorded rows of the layers' inputs after
    folding."""

    inputs: Inputs
    folds: dict[str, ChannelGrid]
    grids: dict[str, LayerGrid]
    plain: dict[str, LayerGrid] | None = None  # grids of `mse`, if asked for and others than `grids`


def silent(total: int, desc: str, unit: str) -> AbstractContextManager[Any]:
    return tqdm(total=total, desc=desc, unit=unit, disable=True)


def calibrate_(
    transformer: nn.Module,
    family: Family,
    data: LatentDataset,
    params: Params,
    progress: Progress = silent,
    with_plain: bool = False,
) -> Calibration:
    """Record, fold (the transformer is changed in place) and search, as the method of `params` does it.

    `with_plain` also searches as `mse` does, before anything is folded, unless the method's own grids are those.
    """
    method = params.chosen
    with progress(_samples(data, params), "inputs", unit="clip") as bar:
        inputs = record_inputs(transformer, family, data, params, bar.update)
    with_plain = with_plain and not method.searches_plainly
    with progress(len(inputs) * (1 + with_plain), "layers", unit="layer") as bar:
        plain = search_grids(transformer, inputs, params, "mse", bar.update) if with_plain else None
        folds = fold_inputs_(transformer, family, inputs, method)
        grids = search_grids(transformer, inputs, params, params.method, bar.update)
    return Calibration(inputs, folds, grids, plain)


@torch.no_grad()
def record_inputs(
    transformer: nn.Module,
    family: Family,
    data: LatentDataset,
    params: Params,
    on_clips: Callable[[int], object] = lambda clips: None,
) -> Inputs:
    """Inputs of every layer that the scheme targets: the full-precision model runs over the calibration clips, sample i at a
    random timestep of group i mod `timestep_groups`; where there are fewer clips than groups, each clip at several. Of two
    experts each has groups that only the other one sees: they get the rows of the nearest. `on_clips(n)` is called after every
    batch."""
    scheme = params.effective_scheme
    groups = scheme.timestep_groups
    layers = match_linears(transformer, scheme.targets, scheme.ignore, family.default_targets)
    generator = torch.Generator().manual_seed(params.seed)
    recorder = InputRecorder(groups, params.calibrate.tokens_per_group, params.seed)
    device = next(transformer.parameters()).device
    low, high = family.noise_range
    reached = torch.arange(math.floor(low * groups), math.ceil(high * groups))  # the groups of its noise levels
    with recorder.attached({name: transformer.get_submodule(name) for name in layers}):
        for index in _batches(data, params):
            clean, text = data.batch(index % len(data), 0.0, generator)
            image, group = data.image[index % len(data)], reached[index % len(reached)]
            # Of a group that is reached in part, that part.
            begins, ends = ((level * groups - group).clamp(0, 1) for level in family.noise_range)
            within = begins + (ends - begins) * torch.rand(len(index), generator=generator)
            # Whole timesteps: families with discrete noise levels have no others.
            timestep = torch.floor((group + within) * NUM_TRAIN_TIMESTEPS / groups)
            noise = torch.randn(clean.shape, generator=generator)
            recorder.group = timestep_group(timestep, groups, NUM_TRAIN_TIMESTEPS)
            clean, noise, timestep, text, image = (x.to(device) for x in (clean, noise, timestep, text, image))
            family.predict(transformer, family.add_noise(clean, noise, timestep), timestep, text, image)
            on_clips(len(index))
    nearest = torch.arange(groups).clamp(int(reached[0]), int(reached[-1])).tolist()
    return {name: [recorder.inputs(name, group) for group in nearest] for name in layers}


def _batches(data: LatentDataset, params: Params) -> list[torch.Tensor]:
    """Numbers of samples, each batch of clips of one size, in the order of their first."""
    samples, size = torch.arange(_samples(data, params)), params.calibrate.batch_size
    if not data.has_several_sizes:
        return list(samples.split(size))
    sizes = data.size_index[samples % len(data)]
    parts = [part for each in sizes.unique() for part in samples[sizes == each].split(size)]
    return sorted(parts, key=lambda part: int(part[0]))


def _samples(data: LatentDataset, params: Params) -> int:
    return max(len(data), params.effective_scheme.timestep_groups)


def fold_inputs_(transformer: nn.Module, family: Family, inputs: Inputs, method: Method) -> dict[str, ChannelGrid]:
    """Fold every input that was recorded and that the method shifts and scales, in the transformer and in the recorded rows,
    both in place. Returns what was folded, by the input's name, for `apply_folds_`."""
    folds = {}
    for source in family.foldable_inputs(transformer):
        if not all(name in inputs for name in source.layers):
            continue  # a layer left in full precision
        grids = [method.channel_grid(torch.cat(inputs[name])) for name in source.layers]
        wanted = [grid for grid in grids if grid is not None]
        if len(wanted) < len(grids):
            continue
        shifts, scales = zip(*wanted, strict=True)
        scale = torch.stack(scales).log().mean(0).exp() if source.scales else torch.ones_like(scales[0])
        fold = ChannelGrid(shifts[0] if source.shifts else torch.zeros_like(shifts[0]), scale)
        fold_(transformer, source, fold)
        for name in source.layers:
            inputs[name] = [(rows - fold.shift) / fold.scale for rows in inputs[name]]
        folds[source.name] = fold
    return folds


def search_grids(
    transformer: nn.Module, inputs: Inputs, params: Params, method: str, on_layers: Callable[[int], object]
) -> dict[str, LayerGrid]:
    """Grids of every recorded layer, on the CPU, by the search of `method`, which runs where the transformer is."""
    card, scheme, grids = METHODS[method], params.scheme_of(method), {}
    for name, rows in inputs.items():
        weight = transformer.get_parameter(f"{name}.weight")
        rows = [x.to(weight.device) for x in rows]  # of one layer at a time
        grids[name] = card.search(weight, rows, scheme, params.calibrate).to(torch.device("cpu"))
        on_layers(1)
    return grids


def apply_folds_(transformer: nn.Module, family: Family, folds: Mapping[str, ChannelGrid]) -> None:
    """Repeat, on a fresh transformer, the folds that `fold_inputs_` made on another copy. Raises ValueError for a fold of
    another model."""
    sources = family.foldable_inputs(transformer)
    if unknown := sorted(folds.keys() - {source.name for source in sources}):
        raise ValueError(f"the input of {unknown[0]} cannot be folded in this model; run calibration with this model")
    for source in sources:  # in their order: an input is scaled with others before it is shifted
        if source.name in folds:
            fold_(transformer, source, folds[source.name])
