"""The plain search finds the best of its candidates, and better grids than whole ranges."""

import pytest
import torch

from qvgen.quant.fake_quantizer import WeightQuantizer
from qvgen.quant.grid import LayerGrid, layer_error
from qvgen.quant.scheme import QuantArgs, QuantScheme
from qvgen.quant.search.mse import search_clips, search_grid, search_weight_grid
from qvgen.quant.search.settings import SearchSettings

CLIPS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
SETTINGS = SearchSettings(weight_candidates=80, mse_exponent=2.4, clip_candidates=CLIPS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("strategy, size", [("tensor", None), ("channel", None), ("group", 16)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_weight_search_is_the_best_of_its_candidates(strategy: str, size: int | None, symmetric: bool) -> None:
    args = QuantArgs(num_bits=3, strategy=strategy, group_size=size, symmetric=symmetric)  # type: ignore[arg-type]
    weight = normal(8, 64)
    weight[0, 3] = 9.0  # an outlier that the search should clip
    scale, zero_point = search_weight_grid(weight, args, SETTINGS)
    searched = WeightQuantizer(args, scale, zero_point).dequantized(weight)
    whole = WeightQuantizer.min_max(args, weight).dequantized(weight)
    assert (searched - weight).abs().pow(2.4).sum() < 0.9 * (whole - weight).abs().pow(2.4).sum()
    one, _ = search_weight_grid(weight, args, SETTINGS.model_copy(update={"weight_candidates": 1}))
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


def test_searched_grid_beats_whole_ranges() -> None:
    weight = normal(32, 256, seed=2) / 16
    scheme = QuantScheme(timestep_groups=2)
    inputs = [normal(64, 256), 5 * normal(64, 256, seed=1)]
    grid = search_grid(weight, inputs, scheme, SETTINGS)
    searched = layer_error(weight, grid, inputs, scheme)
    whole = layer_error(weight, LayerGrid.min_max(weight, scheme), inputs, scheme)
    assert searched.output < whole.output
    assert searched.activation < whole.activation
    assert grid.clip_lower is not None and grid.clip_lower.shape == (2,)
