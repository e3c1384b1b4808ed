"""Before the first step: record what every layer reads, fold what can be folded, search the grids. In the order of use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from qvgen.data.latents import LatentDataset
from qvgen.methods.method import Method
from qvgen.methods.qvgen_plus import channel_grid
from qvgen.models.family import NUM_TRAIN_TIMESTEPS, Family
from qvgen.models.folding import ChannelGrid, fold_
from qvgen.params import Calibrate
from qvgen.quant.calibrate import InputRecorder, LayerGrid
from qvgen.quant.primitives import timestep_group
from qvgen.quant.scheme import QuantScheme

Inputs = dict[str, list[torch.Tensor]]  # layer -> recorded rows (m, K) per timestep group
OnBatch = Callable[[int], object]


@torch.no_grad()
def record_inputs(
    transformer: nn.Module,
    family: Family,
    data: LatentDataset,
    layers: Sequence[str],
    groups: int,
    settings: Calibrate,
    seed: int,
    on_batch: OnBatch = lambda clips: None,
) -> Inputs:
    """Run the full-precision model over the calibration clips, sample i at a random timestep of group i mod `groups`."""
    generator = torch.Generator().manual_seed(seed)
    recorder = InputRecorder(groups, settings.tokens_per_group, seed)
    with recorder.attached({name: transformer.get_submodule(name) for name in layers}):
        for index in torch.arange(len(data)).split(settings.batch_size):
            clean, text = data.batch(index, 0.0, generator)
            within = torch.rand(len(index), generator=generator)
            # Whole timesteps: families with discrete noise levels have no others.
            timestep = torch.floor((index % groups + within) * NUM_TRAIN_TIMESTEPS / groups)
            noisy = family.add_noise(clean, torch.randn(clean.shape, generator=generator), timestep)
            recorder.group = timestep_group(timestep, groups, NUM_TRAIN_TIMESTEPS)
            family.predict(transformer, noisy, timestep, text)
            on_batch(len(index))
    return {name: [recorder.inputs(name, group) for group in range(groups)] for name in layers}


def fold_inputs_(transformer: nn.Module, family: Family, inputs: Inputs) -> dict[str, ChannelGrid]:
    """Fold every input whose layers were recorded, in the transformer and in the recorded rows, both in place. Returns what
    was folded, by the input's name, for `apply_folds_`."""
    folds = {}
    for source in family.foldable_inputs(transformer):
        if not all(name in inputs for name in source.layers):
            continue  # a layer left in full precision
        shifts, scales = zip(*(channel_grid(torch.cat(inputs[name])) for name in source.layers), strict=True)
        scale = torch.stack(scales).log().mean(0).exp() if source.scales else torch.ones_like(scales[0])
        fold = ChannelGrid(shifts[0] if source.shifts else torch.zeros_like(shifts[0]), scale)
        fold_(transformer, source, fold)
        for name in source.layers:
            inputs[name] = [(rows - fold.shift) / fold.scale for rows in inputs[name]]
        folds[source.name] = fold
    return folds


def apply_folds_(transformer: nn.Module, family: Family, folds: Mapping[str, ChannelGrid]) -> None:
    """Do to a fresh transformer what `fold_inputs_` did to another copy. Raises ValueError for a fold of another model."""
    sources = family.foldable_inputs(transformer)
    if unknown := sorted(folds.keys() - {source.name for source in sources}):
        raise ValueError(f"the input of {unknown[0]} cannot be folded in this model; run calibration with this model")
    for source in sources:  # in their order: an input is scaled with others before it is shifted
        if source.name in folds:
            fold_(transformer, source, folds[source.name])


def search_grids(
    transformer: nn.Module,
    inputs: Inputs,
    method: Method,
    scheme: QuantScheme,
    settings: Calibrate,
    on_layer: OnBatch = lambda layers: None,
) -> dict[str, LayerGrid]:
    """Grids of every recorded layer, by the method's own search."""
    searched = settings.model_dump(include={"weight_candidates", "mse_exponent", "clip_candidates"})
    grids = {}
    for name, rows in inputs.items():
        grids[name] = method.calibrate(transformer.get_submodule(name), rows, scheme, **searched)
        on_layer(1)
    return grids
