"""Folded inputs: the model computes what it did, and its layers read (x - shift) / scale."""

import pytest
import torch
from torch import nn

from qvgen.methods.registry import METHODS
from qvgen.models.cogvideox import CogVideoXFamily
from qvgen.models.cogvideox import tiny_transformer as tiny_cogvideox_transformer
from qvgen.models.family import Family
from qvgen.models.flux import FluxFamily
from qvgen.models.flux import tiny_transformer as tiny_flux_transformer
from qvgen.models.folding import ChannelGrid, FoldableInput, fold_, shift_fold
from qvgen.models.hunyuan import HunyuanVideoFamily
from qvgen.models.hunyuan import tiny_transformer as tiny_hunyuan_transformer
from qvgen.models.ltx import LTXFamily
from qvgen.models.ltx import tiny_transformer as tiny_ltx_transformer
from qvgen.models.pixart import PixArtFamily
from qvgen.models.pixart import tiny_transformer as tiny_pixart_transformer
from qvgen.models.qwen_image import QwenImageFamily
from qvgen.models.qwen_image import tiny_transformer as tiny_qwen_image_transformer
from qvgen.models.stable_diffusion_3 import StableDiffusion3Family
from qvgen.models.stable_diffusion_3 import tiny_transformer as tiny_stable_diffusion_transformer
from qvgen.models.wan import WanFamily
from qvgen.models.wan import tiny_transformer as tiny_wan_transformer
from qvgen.models.wan.image import WanImageFamily
from qvgen.models.wan.image import tiny_transformer as tiny_wan_image_transformer
from qvgen.models.wan.vace import WanVACEFamily
from qvgen.models.wan.vace import tiny_transformer as tiny_wan_vace_transformer
from qvgen.quant.grid import layer_error
from qvgen.quant.scheme import QuantArgs, QuantScheme
from qvgen.quant.search.mse import search_grid
from qvgen.quant.search.settings import SearchSettings
from tests.support.families import KINDS

SAME = 2e-5  # largest difference over the largest output: float32 sums in another order


def subject(name: str) -> tuple[nn.Module, Family, tuple[torch.Tensor, ...]]:
    """A two-layer model whose parameters are all random, biases and tables too, and one input."""
    model, family = {
        "wan": lambda: (tiny_wan_transformer(), WanFamily()),
        "wan_image": lambda: (tiny_wan_image_transformer(), WanImageFamily()),
        "cogvideox": lambda: (tiny_cogvideox_transformer(), CogVideoXFamily({})),
        "wan_vace": lambda: (tiny_wan_vace_transformer(), WanVACEFamily()),
        "ltx": lambda: (tiny_ltx_transformer(), LTXFamily()),
        "pixart": lambda: (tiny_pixart_transformer(), PixArtFamily({})),
        "flux": lambda: (tiny_flux_transformer(), FluxFamily.from_scheduler({})),
        "hunyuan_video": lambda: (tiny_hunyuan_transformer(), HunyuanVideoFamily.from_scheduler({})),
        "qwen_image": lambda: (tiny_qwen_image_transformer(), QwenImageFamily()),
        "stable_diffusion_3": lambda: (tiny_stable_diffusion_transformer(), StableDiffusion3Family()),
    }[name]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    config = model.config
    if name not in ("wan", "cogvideox"):
        return model, family, (*KINDS[name].inputs(2)[:1], torch.tensor([100.0, 900.0]), *KINDS[name].inputs(2)[1:])
    if name == "wan":
        latents = torch.randn(2, config.in_channels, 3, 4, 4, generator=generator)
        text = torch.randn(2, 6, config.text_dim, generator=generator)
    else:
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        shape = (2, frames, config.in_channels, config.sample_height, config.sample_width)
        latents = torch.randn(shape, generator=generator)
        text = torch.randn(2, config.max_text_seq_length, config.text_embed_dim, generator=generator)
    return model, family, (latents, torch.tensor([100.0, 900.0]), text)


def read_inputs(model: nn.Module, family: Family, inputs: tuple[torch.Tensor, ...], layer: str) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _module, args: kept.append(args[0]))
    with torch.no_grad():
        family.predict(model, *inputs)
    handle.remove()
    return kept[0].flatten(0, -2)


# Inputs that fold. Of wan_image not that of the image's and the text's attention together: both have values of their own.
COUNTS = {"wan": 3 + 2 * 5, "wan_image": 3 + 2 * 4, "wan_vace": 3 + 4 * 5, "cogvideox": 2 * 3, "ltx": 3 + 2 * 4}
COUNTS |= {"pixart": 3 + 2 * 4, "flux": 5 + 1, "hunyuan_video": 5 + 1, "qwen_image": 2 * 5, "stable_diffusion_3": 7 + 3}


@pytest.mark.parametrize("name", COUNTS)
def test_folding_changes_the_inputs_and_not_the_model(name: str) -> None:
    model, family, inputs = subject(name)
    with torch.no_grad():
        before = family.predict(model, *inputs)
    sources = family.foldable_inputs(model)
    assert len(sources) == COUNTS[name]
    assert len({source.name for source in sources}) == len(sources)
    assert {layer for source in sources for layer in source.layers} <= {n for n, _ in model.named_modules()}
    generator = torch.Generator().manual_seed(2)
    for source in sources:
        x = read_inputs(model, family, inputs, source.layers[0])
        shift = torch.randn(x.shape[1], generator=generator) if source.shifts else torch.zeros(x.shape[1])
        scale = torch.rand(x.shape[1], generator=generator) + 0.5 if source.scales else torch.ones(x.shape[1])
        fold_(model, source, ChannelGrid(shift, scale))
        torch.testing.assert_close(
            read_inputs(model, family, inputs, source.layers[0]), (x - shift) / scale, rtol=1e-3, atol=1e-4
        )
    with torch.no_grad():
        after = family.predict(model, *inputs)
    assert (after - before).abs().max() <= SAME * before.abs().max()


def test_impossible_folds_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    fixed = FoldableInput(("0",), shift_fold(torch.zeros(4)), scales=False)
    with pytest.raises(ValueError, match="shifted, not scaled"):
        fold_(model, fixed, ChannelGrid(torch.zeros(4), 2 * torch.ones(4)))
    with pytest.raises(ValueError, match="positive scales"):
        fold_(model, fixed, ChannelGrid(torch.zeros(4), torch.zeros(4)))
    shared = FoldableInput(("0",), shift_fold(torch.zeros(4)), shifts=False)
    with pytest.raises(ValueError, match="scaled, not shifted"):
        fold_(model, shared, ChannelGrid(torch.ones(4), torch.ones(4)))
    bare = FoldableInput(("1",), shift_fold(torch.zeros(4)), scales=False)
    with pytest.raises(ValueError, match="1 has no bias"):
        fold_(model, bare, ChannelGrid(torch.zeros(4), torch.ones(4)))


def test_channel_grid_by_hand() -> None:
    rows = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 8.0], [3.0, 8.0]])  # means 2 and 4, deviations 1 and 4, mean 2.5
    grid = METHODS["qvgen+"].channel_grid(rows)
    assert grid is not None
    shift, scale = grid
    assert shift.tolist() == [2.0, 4.0]
    torch.testing.assert_close(scale, torch.tensor([0.4, 1.6]).sqrt())


def test_folding_helps_where_channels_differ() -> None:
    """A layer whose inputs have channel means three times their deviation: relative output error, 3 bits."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 32)
    layer.weight.data = torch.randn(32, 64, generator=generator) / 8
    rows = torch.randn(400, 64, generator=generator) + 3 * torch.randn(64, generator=generator)
    args = QuantArgs(num_bits=3, zero_point_domain="float")
    scheme = QuantScheme(weights=args, input_activations=QuantArgs(num_bits=3, strategy="token"), timestep_groups=1)
    settings = SearchSettings(weight_candidates=40, mse_exponent=2.4, clip_candidates=(0.95, 0.9, 0.8, 0.7, 0.6, 0.5))

    def absolute_error(x: torch.Tensor) -> float:
        error = layer_error(layer.weight, search_grid(layer.weight, [x], scheme, settings), [x], scheme)
        return error.output * float((x @ layer.weight.detach().T).square().sum())

    plain = absolute_error(rows)
    assert absolute_error(rows - rows.mean(0)) < 0.3 * plain
