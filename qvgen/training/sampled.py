"""Calibration without clips: the inputs of the layers are recorded while the full-precision pipeline samples prompts.

For a user who has prompts and no videos, and for pipelines that no family describes. The stages calibrate on noised clips
instead (calibration.py), which see every timestep; sampling sees those of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from qvgen.nn.targets import match_linears
from qvgen.nn.timestep import timestep_of
from qvgen.quant.grid import LayerGrid
from qvgen.quant.primitives import NUM_TRAIN_TIMESTEPS, timestep_group
from qvgen.quant.scheme import QuantScheme
from qvgen.quant.search.mse import search_grid
from qvgen.quant.search.settings import SearchSettings
from qvgen.training.recorder import InputRecorder

_ROWS = 256  # of the inputs of each layer and timestep group, as `tokens_per_group` of params.yaml
_SETTINGS = SearchSettings(
    mse_exponent=2.4, weight_candidates=80, clip_candidates=(0.99, 0.95, *(0.9 - 0.05 * i for i in range(11)))
)  # those of section `calibrate` of params.yaml


def calibrate_while(
    run: Callable[[], object],
    transformer: nn.Module,
    scheme: QuantScheme,
    *,
    default_targets: Sequence[str] = ("Linear",),
    settings: SearchSettings = _SETTINGS,
    seed: int = 0,
) -> dict[str, LayerGrid]:
    """Grids for `prepare_`, searched on what the layers of the full-precision `transformer` read while `run` calls it.

    `run` samples some prompts with the pipeline that the transformer belongs to. A timestep group that it never reaches gets
    the rows of the nearest one that it does. Raises ValueError if `run` does not call every layer, for several groups of a
    model that is called without `timestep`, and for a scheme with extras, whose methods have searches of their own.
    """
    if scheme.extras:
        raise ValueError(f"{', '.join(scheme.extras)} of the scheme are not searched here: use calibrate of qvgen.training")
    names = match_linears(transformer, scheme.targets, scheme.ignore, default_targets)
    recorder, reached = InputRecorder(scheme.timestep_groups, _ROWS, seed), set[int]()
    handle = transformer.register_forward_pre_hook(partial(_group, recorder, reached), with_kwargs=True)
    try:
        with recorder.attached({name: transformer.get_submodule(name) for name in names}), torch.no_grad():
            run()
    finally:
        handle.remove()
    if not reached:
        raise ValueError(f"{type(transformer).__name__} was not called: let run() sample with the pipeline that has it")
    nearest = [min(reached, key=lambda found: (abs(found - group), found)) for group in range(scheme.timestep_groups)]
    grids = {}
    for name in names:
        weight = transformer.get_parameter(f"{name}.weight")
        rows = {group: recorder.inputs(name, group).to(weight.device) for group in reached}
        found = search_grid(weight, [rows[group] for group in nearest], scheme, settings)
        grids[name] = found.to(torch.device("cpu"))
    return grids


def _group(
    recorder: InputRecorder, reached: set[int], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Tell the recorder the timestep group of each sample of a call that begins."""
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    timestep = kwargs.get("timestep")
    if timestep is None:
        if recorder.groups > 1:
            raise ValueError(f"{type(model).__name__} is called without timestep=...: set timestep_groups to 1")
        timestep = torch.zeros(1)
    timestep = timestep_of(model, timestep).cpu()
    recorder.group = timestep_group(timestep, recorder.groups, NUM_TRAIN_TIMESTEPS).expand(len(hidden))
    reached.update(recorder.group.tolist())
