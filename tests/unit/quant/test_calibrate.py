"""Calibration finds better grids than whole ranges, keeps groups apart, and refuses bad data."""

import pytest
import torch
from torch import nn

from qvgen.quant.calibrate import (
    InputRecorder,
    LayerGrid,
    calibrate_layer,
    layer_error,
    search_clips,
    search_weight_grid,
)
from qvgen.quant.fake_quantizer import WeightQuantizer
from qvgen.quant.scheme import QuantArgs, QuantScheme

CLIPS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("strategy, size", [("tensor", None), ("channel", None), ("group", 16)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_weight_search_is_the_best_of_its_candidates(strategy: str, size: int | None, symmetric: bool) -> None:
    args = QuantArgs(num_bits=3, strategy=strategy, group_size=size, symmetric=symmetric)  # type: ignore[arg-type]
    weight = normal(8, 64)
    weight[0, 3] = 9.0  # an outlier that the search should clip
    scale, zero_point = search_weight_grid(weight, args, candidates=80, exponent=2.4)
    searched = WeightQuantizer(args, scale, zero_point).dequantized(weight)
    whole = WeightQuantizer.min_max(args, weight).dequantized(weight)
    assert (searched - weight).abs().pow(2.4).sum() < 0.9 * (whole - weight).abs().pow(2.4).sum()
    one, _ = search_weight_grid(weight, args, candidates=1, exponent=2.4)
    assert torch.equal(one, WeightQuantizer.min_max(args, weight).scale)


def test_best_clip_falls_with_the_number_of_levels() -> None:
    x, importance = normal(128, 512), torch.ones(512)
    clips = [search_clips(x, importance, QuantArgs(num_bits=b, strategy="token"), CLIPS)[0] for b in (8, 4, 2)]
    assert clips[0] == 0.95 and clips[0] > clips[1] > clips[2]


def test_sides_are_searched_apart() -> None:
    x = normal(128, 256)
    x[:, 0] = 30.0  # one large positive input without importance: only the upper side should be clipped
    importance = torch.ones(256)
    importance[0] = 0.0
    lower, upper = search_clips(x, importance, QuantArgs(num_bits=4, strategy="token"), CLIPS)
    assert upper == min(CLIPS) and lower > upper


def test_calibrated_layer_beats_whole_ranges() -> None:
    layer = nn.Linear(256, 32)
    scheme = QuantScheme(timestep_groups=2)
    inputs = [normal(64, 256), 5 * normal(64, 256, seed=1)]
    grid = calibrate_layer(layer, inputs, scheme, weight_candidates=80, mse_exponent=2.4, clip_candidates=CLIPS)
    searched = layer_error(layer, grid, inputs, scheme)
    whole = layer_error(layer, LayerGrid.min_max(layer.weight, scheme), inputs, scheme)
    assert searched.output < whole.output
    assert searched.activation < whole.activation
    assert grid.clip_lower is not None and grid.clip_lower.shape == (2,)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_recorder_keeps_groups_apart_and_bounded() -> None:
    model, recorder = _Model(), InputRecorder(groups=3, rows=20)
    x = torch.stack([torch.full((50, 4), float(i)) for i in range(3)])
    with recorder.attached({"layer": model.layer}):
        for _ in range(4):
            recorder.group = torch.tensor([0, 1, 1])
            model(x)
    assert recorder.inputs("layer", 0).shape == (20, 4) and (recorder.inputs("layer", 0) == 0).all()
    assert set(recorder.inputs("layer", 1).unique().tolist()) <= {1.0, 2.0}
    with pytest.raises(ValueError, match="no calibration input of timestep group 2"):
        recorder.inputs("layer", 2)
    before = recorder.inputs("layer", 0)
    model(x)  # detached: nothing more is recorded
    assert torch.equal(recorder.inputs("layer", 0), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_calibration_data_names_the_layer(bad: float) -> None:
    model, recorder = _Model(), InputRecorder(groups=1, rows=4)
    recorder.group = torch.tensor([0])
    x = torch.zeros(1, 2, 4)
    x[0, 1, 2] = bad
    with recorder.attached({"blocks.0.layer": model.layer}), pytest.raises(ValueError, match=r"blocks\.0\.layer"):
        model(x)
