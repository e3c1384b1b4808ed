"""Threads that each have a pipeline of their own over one packed transformer: the same latents as alone."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from qvgen.integrations.fused.wan import fuse_wan_
from qvgen.models.tiny import TINY_CLIP, tiny_pipeline
from qvgen.models.wan import WanFamily
from qvgen.nn.swap import convert_, prepare_
from qvgen.nn.timestep import track_timestep
from qvgen.quant.grid import LayerGrid
from qvgen.quant.scheme import QuantScheme

THREADS = 4
DIGITS = ["one", "two", "three", "four", "five"]
PROMPTS = [f"a {colour} digit {digit} moving up" for colour in ("red", "green") for digit in DIGITS]
SCHEME = QuantScheme(timestep_groups=10)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(tiny_pipeline("wan", tmp_path_factory.mktemp("wan")), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    model = pipeline.transformer
    names = prepare_(copy.deepcopy(model), SCHEME, default_targets=WanFamily.default_targets)
    clips = torch.linspace(0.3, 0.95, SCHEME.timestep_groups)
    grids = {name: LayerGrid.min_max(model.get_submodule(name).weight, SCHEME) for name in names}
    for grid in grids.values():
        object.__setattr__(grid, "clip_lower", clips)
        object.__setattr__(grid, "clip_upper", clips.flip(0))
    prepare_(model, SCHEME, default_targets=WanFamily.default_targets, grids=grids)
    convert_(model)
    fuse_wan_(model)
    return pipeline


def own(pipeline: Any) -> Any:
    twin = type(pipeline)(**{**pipeline.components, "scheduler": copy.deepcopy(pipeline.scheduler)})
    twin.set_progress_bar_config(disable=True)
    return twin


def latents(pipeline: Any, prompt: str) -> torch.Tensor:
    # Another number of steps for every prompt, so that the timesteps of two threads seldom agree.
    steps = 3 + PROMPTS.index(prompt)
    return pipeline(
        prompt,
        num_frames=TINY_CLIP.frames,
        height=TINY_CLIP.height,
        width=TINY_CLIP.width,
        max_sequence_length=TINY_CLIP.max_sequence_length,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(steps),
        output_type="latent",
    ).frames


def check_threads(pipeline: Any) -> None:
    pipelines = [own(pipeline) for _ in range(THREADS)]
    alone = [latents(pipelines[0], prompt) for prompt in PROMPTS]
    assert not torch.equal(alone[0], alone[1])

    def all_prompts(number: int) -> list[torch.Tensor]:
        torch.set_num_threads(1)  # a number of each thread's own
        shifted = PROMPTS[number:] + PROMPTS[:number]
        made = dict(zip(shifted, (latents(pipelines[number], prompt) for prompt in shifted), strict=True))
        return [made[prompt] for prompt in PROMPTS]

    with ThreadPoolExecutor(THREADS) as pool:
        for made in pool.map(all_prompts, range(THREADS)):
            assert [torch.equal(a, b) for a, b in zip(made, alone, strict=True)] == [True] * len(PROMPTS)


@pytest.mark.slow
def test_eager(pipeline: Any) -> None:
    check_threads(pipeline)


@pytest.mark.slow
def test_block_by_block_in_diffusers_own_layout(pipeline: Any) -> None:
    """The forward of full-precision blocks, and a transformer whose blocks are compiled one by one."""
    regional = copy.deepcopy(pipeline)
    torch.compiler.reset()
    regional.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    check_threads(regional)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled(pipeline: Any, backend: str) -> None:
    whole = copy.deepcopy(pipeline)
    torch.compiler.reset()
    whole.transformer = torch.compile(whole.transformer, fullgraph=True, dynamic=True, backend=backend)
    check_threads(whole)


def test_group_offload(pipeline: Any) -> None:
    offloaded = copy.deepcopy(pipeline)
    cpu = torch.device("cpu")
    expected = latents(own(pipeline), PROMPTS[0])
    offloaded.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    # Tensors that moved lie at other addresses, and PyTorch's own matrix products round by them.
    torch.testing.assert_close(latents(offloaded, PROMPTS[0]), expected, rtol=1e-3, atol=1e-3)


def test_the_number_of_groups_belongs_to_the_layers(pipeline: Any) -> None:
    expected = latents(own(pipeline), PROMPTS[0])
    track_timestep(pipeline.transformer, 3)  # what else the model may be told
    try:
        assert torch.equal(latents(own(pipeline), PROMPTS[0]), expected)
    finally:
        track_timestep(pipeline.transformer, SCHEME.timestep_groups)
