"""Calibration while a pipeline samples: the grids are those of the inputs that the layers read, per timestep group."""

from typing import Any

import pytest
import torch
from torch import nn

from qvgen.models.family import ClipSize
from qvgen.models.registry import family_adapter
from qvgen.models.tiny import TINY_PROMPT
from qvgen.models.wan import WanFamily
from qvgen.nn.swap import prepare_
from qvgen.quant.scheme import QuantArgs, QuantScheme
from qvgen.quant.search.mse import search_grid
from qvgen.sampling.sample import generate
from qvgen.training.sampled import _SETTINGS, calibrate_while
from tests.support.any_pipelines import latents, make

GROUPS = 8
SCHEME = QuantScheme(timestep_groups=GROUPS, weights=QuantArgs(num_bits=4), targets=("first",))


class Two(nn.Module):
    """Called by timestep, with inputs that grow with it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 4), nn.Linear(4, 4)
        with torch.no_grad():
            self.first.weight[:, 0] = 0  # of the outlier, which clipping then costs nothing

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        return self.second(self.first(hidden_states))


def rows(timestep: float) -> torch.Tensor:
    x = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(int(timestep)))
    x[..., 0] *= 1 + timestep / 100
    return x


def test_each_group_has_the_clips_of_its_own_rows_or_of_the_nearest() -> None:
    model, sampled = Two(), {100.0: 0, 400.0: 3, 999.0: 7}

    def run() -> None:
        for timestep in sampled:
            model(hidden_states=rows(timestep), timestep=torch.tensor([timestep]))

    grid = calibrate_while(run, model, SCHEME)["first"]
    assert grid.clip_lower is not None and grid.clip_upper is not None
    own = {group: rows(timestep).reshape(-1, 16) for timestep, group in sampled.items()}
    nearest = [0, 0, 3, 3, 3, 3, 7, 7]  # the lower one of two
    expected = search_grid(model.first.weight, [own[group] for group in nearest], SCHEME, _SETTINGS)
    assert expected.clip_lower is not None and expected.clip_upper is not None
    assert torch.equal(grid.clip_lower, expected.clip_lower) and torch.equal(grid.clip_upper, expected.clip_upper)
    assert len(set(grid.clip_upper.tolist())) > 1 and torch.equal(grid.scale, expected.scale)
    assert not model._forward_pre_hooks and not model.first._forward_pre_hooks
    prepare_(model, SCHEME, grids={"first": grid})


def test_bad_calls_are_told() -> None:
    model = Two()
    with pytest.raises(ValueError, match="Two was not called"):
        calibrate_while(lambda: None, model, SCHEME)
    with pytest.raises(ValueError, match=r"called without timestep=\.\.\.: set timestep_groups to 1"):
        calibrate_while(lambda: model(rows(1)), model, SCHEME)
    assert calibrate_while(lambda: model(rows(1)), model, SCHEME.model_copy(update={"timestep_groups": 1}))
    with pytest.raises(ValueError, match="low_rank of the scheme are not searched here"):
        calibrate_while(lambda: None, model, SCHEME.model_copy(update={"low_rank": 2}))
    with pytest.raises(RuntimeError, match="stop"):
        calibrate_while(stop, model, SCHEME)
    assert not model._forward_pre_hooks


def stop() -> None:
    raise RuntimeError("stop")


def test_pipelines_with_guidance_and_without_a_family() -> None:
    scheme = QuantScheme(timestep_groups=2)
    pipeline: Any = WanFamily.tiny_pipeline()
    family = family_adapter(pipeline)
    size, steps = ClipSize(9, 32, 32, 8), {"inference_steps": 4, "guidance_scale": 3.0}
    targets = family.default_targets
    grids = calibrate_while(
        lambda: generate(pipeline, family, [TINY_PROMPT], [0], size, **steps),
        pipeline.transformer,
        scheme,
        default_targets=targets,
    )
    assert len(grids) == 20
    image, call = make("flux")
    one = scheme.model_copy(update={"timestep_groups": 1})
    assert calibrate_while(
        lambda: latents(image, call), image.transformer, one, default_targets=(r"re:transformer_blocks\..*",)
    )
