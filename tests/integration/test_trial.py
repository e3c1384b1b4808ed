"""Observing and comparing models, on both families with random weights."""

import copy
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qvgen.checkpoint import pipeline as loading
from qvgen.checkpoint.pipeline import ENCODERS, PipelineFolder, load_pipeline
from qvgen.data.digits import ALL_ATTRIBUTES
from qvgen.data.latents import LatentDataset
from qvgen.evaluation.quality.similarity import MAX_PSNR_DB
from qvgen.evaluation.quality.trial import (
    ACCURACIES,
    Observation,
    Trial,
    answer,
    collect,
    compare,
    observe,
    prompt_accuracy,
    velocity_mse,
)
from qvgen.models.hunyuan.text import HunyuanVideoFamily
from qvgen.models.registry import family_adapter
from qvgen.models.tiny import TINY_CLIP, TINY_PROMPT, tiny_pipeline
from qvgen.nn.swap import convert_, prepare_
from qvgen.params import load_params
from qvgen.quant.scheme import QuantArgs, QuantScheme
from qvgen.sampling.sample import sample
from qvgen.sampling.velocities import spread_timesteps
from qvgen.share import Share
from tests.support.families import KINDS

FAMILIES = ("wan", "wan_image", "cogvideox", "ltx", "hunyuan_video", "sana")
PROMPTS = (TINY_PROMPT, "a blue digit one moving left", "a green digit zero moving down")
PIECES = {"latents": 2, "velocities-0": 4}  # three videos, and three clips at two timesteps, in batches of two
BATCH_TOLERANCE = 2e-4  # reductions of another batch size


@pytest.fixture(scope="module", params=FAMILIES)
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tiny_pipeline(request.param, tmp_path_factory.mktemp("pipeline") / "folder")
    pipeline = load_pipeline(folder)
    family = family_adapter(pipeline)
    with torch.no_grad():
        text = family.encode_text(pipeline, PROMPTS, TINY_CLIP.max_sequence_length)
    latents, _, image = KINDS[request.param].inputs(3)
    pictures = torch.randint(256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    trial = Trial(
        prompts=PROMPTS,
        seeds=(0, 1, 2),
        size=KINDS[request.param].clip,
        latents=latents,
        text=text,
        timesteps=(100.0, 900.0),
        seed=0,
        inference_steps=2,
        guidance_scale=2.0,
        batch_size=2,
        image=image,
        first_frames=pictures if family.reads_image else None,
        guidance_is_told=family.guidance_is_told,
    )
    return SimpleNamespace(pipeline=pipeline, family=family, trial=trial, name=request.param, folder=folder)


def packed(setup: SimpleNamespace, bits: int) -> SimpleNamespace:
    pipeline = copy.copy(setup.pipeline)
    pipeline.transformer = copy.deepcopy(setup.pipeline.transformer)
    scheme = QuantScheme(
        weights=QuantArgs(num_bits=bits, zero_point_domain="float"),
        input_activations=QuantArgs(num_bits=bits, strategy="token"),
        timestep_groups=5,
    )
    prepare_(pipeline.transformer, scheme, default_targets=setup.family.default_targets)
    convert_(pipeline.transformer)
    return pipeline


def test_a_model_equals_itself(setup: SimpleNamespace) -> None:
    done: list[int] = []
    made: list[int] = []
    hook = setup.pipeline.transformer.register_forward_pre_hook(
        lambda _, *given: made.append(len([*given[0], *given[1].values()][0])), with_kwargs=True
    )
    reference = observe(setup.pipeline, setup.family, setup.trial, on_batch=done.append)
    hook.remove()
    assert sum(done) == sum(made) == setup.trial.predictions == 3 * setup.trial.predictions_per_video + 2 * 3
    assert setup.trial.predictions_per_video == (2 if setup.name == "hunyuan_video" else 2 * 2)  # with guidance two a step
    assert reference.clips.shape == (3, 3, setup.trial.size.frames, 32, 32) and reference.clips.abs().max() <= 1
    held_out = setup.trial.latents
    assert reference.velocities.shape == (2, *setup.family.target(held_out, held_out, torch.ones(3)).shape)
    scores = compare(reference, observe(setup.pipeline, setup.family, setup.trial), setup.trial)
    assert scores["psnr_db"] == MAX_PSNR_DB and scores["ssim"] == pytest.approx(1)
    assert scores["velocity_mse"] == scores["latent_mse"] == 0


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that are loaded, in order. While one is loaded none of those before it may be in memory, but for
    those with which a pipeline encodes the image that it is given, and a second text encoder."""
    names: list[str] = []
    alive: list[weakref.ref[Any]] = []
    with_image, encoders = {"WanTransformer3DModel", "AutoencoderKLWan", "CLIPVisionModel"}, {"LlamaModel", "CLIPTextModel"}

    def watched(name: str) -> None:
        original = getattr(loading, name)

        def load(folder: Path, *arguments: Any, **options: Any) -> Any:
            found = original(folder, *arguments, **options)
            if isinstance(found, torch.nn.Module):
                others = {type(ref()).__name__ for ref in alive if ref() is not None}
                both = {type(found).__name__, *others}
                assert not others or both <= encoders or ("CLIPVisionModel" in names and both <= with_image), names
                names.append(type(found).__name__)
                alive.append(weakref.ref(found))
            return found

        monkeypatch.setattr(loading, name, load)

    watched("load_component")
    watched("load_transformer")
    return names


def test_one_model_in_memory_at_a_time_gives_the_same(setup: SimpleNamespace, tmp_path: Path, loaded: list[str]) -> None:
    """Text encoder, then transformer for videos and velocities, then VAE; answers in files or not."""
    expected = observe(setup.pipeline, setup.family, setup.trial)
    model = PipelineFolder(setup.folder)
    for store in (None, tmp_path):
        assert same(observe(model, setup.family, setup.trial, store=store), expected)
    kept = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())}
    assert [path.name for path in kept] == [f"{name}-0000{i}.safetensors" for name, n in PIECES.items() for i in range(n)]
    own = {name: type(part).__name__ for name, part in setup.pipeline.components.items() if part is not None}
    encoders, vae, once = [own[name] for name in ENCODERS if name in own], own["vae"], loaded[: len(loaded) // 2]
    denoising = once[len(encoders) : -1]
    assert once == [*encoders, *denoising, vae] and loaded == once * 2
    with_image = ["AutoencoderKLWan", "CLIPVisionModel"] if setup.family.reads_image else []
    assert sorted(denoising) == sorted([own["transformer"], *with_image])

    # What is there is not made again, and what a machine that lost its power left is.
    lost, cut = tmp_path / "velocities-0-00001.safetensors", tmp_path / "latents-00000.safetensors"
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-4])
    done, found = [], []
    answer(model, setup.family, setup.trial, on_batch=done.append, store=tmp_path, on_found=found.append)
    video = setup.trial.predictions_per_video
    assert (sum(done), sum(found)) == (2 * video + 1, 1 * video + 5) and sum(done + found) == setup.trial.predictions
    loaded.clear()
    seen = observe(model, setup.family, setup.trial, store=tmp_path)
    assert loaded == [vae] and same(seen, expected)
    again = {path for path in kept if path.stat().st_mtime_ns != kept[path]}
    assert again == {lost, cut} and sorted(tmp_path.iterdir()) == list(kept)

    changed = replace(model, change_=lambda transformer: transformer.proj_out.weight.data.zero_())
    assert observe(changed, setup.family, setup.trial).velocities.abs().max() < expected.velocities.abs().max() / 2


def test_processes_that_share_a_trial_give_what_one_does(setup: SimpleNamespace, tmp_path: Path) -> None:
    """Of three one has no video: there are two batches of them."""
    expected = observe(setup.pipeline, setup.family, setup.trial)
    done: list[int] = []
    for rank in (2, 1, 0):
        own = answer(setup.pipeline, setup.family, setup.trial, 1.0, done.append, tmp_path, Share(rank, 3))
        assert sum(len(pieces.todo) for pieces in (own.latents, *own.velocities)) <= 3
        assert rank == 0 or not list(tmp_path.glob("*-00000.safetensors"))
    assert sum(done) == setup.trial.predictions  # nothing twice
    assert same(collect(own, setup.pipeline, setup.family, setup.trial, tmp_path), expected)


def same(seen: Observation, expected: Observation) -> bool:
    return all(torch.equal(getattr(seen, name), getattr(expected, name)) for name in ("latents", "clips", "velocities"))


def test_large_answers_are_compared_in_parts(setup: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = observe(setup.pipeline, setup.family, setup.trial)
    candidate = observe(packed(setup, 4), setup.family, setup.trial)
    whole = compare(reference, candidate, setup.trial)
    for at_once in (10_000, 100):  # more and less than a clip, which has 27,648 numbers
        monkeypatch.setattr("qvgen.evaluation.quality.similarity.AT_ONCE", at_once)
        assert compare(reference, candidate, setup.trial) == pytest.approx(whole, rel=1e-5)


def test_fewer_bits_are_further_away(setup: SimpleNamespace) -> None:
    reference = observe(setup.pipeline, setup.family, setup.trial)
    eight, three = (
        compare(reference, observe(packed(setup, bits), setup.family, setup.trial), setup.trial) for bits in (8, 3)
    )
    for measure in ("velocity_mse", "latent_mse"):
        assert 0 < eight[measure] < three[measure] / 10
    assert MAX_PSNR_DB > eight["psnr_db"] > three["psnr_db"] + 5
    assert 1 > eight["ssim"] > three["ssim"]


def test_samples_depend_on_their_own_prompt_and_seed_only(setup: SimpleNamespace) -> None:
    def latents(prompts: tuple[str, ...], seeds: tuple[int, ...], batch_size: int) -> torch.Tensor:
        return sample(
            setup.pipeline,
            setup.family,
            prompts,
            seeds,
            setup.trial.size,
            inference_steps=2,
            guidance_scale=2.0,
            batch_size=batch_size,
            images=None if setup.trial.images is None else setup.trial.images[[seed % 3 for seed in seeds]],
        )[0]

    together, alone = latents(PROMPTS, (0, 1, 2), 3), latents(PROMPTS, (0, 1, 2), 1)
    assert torch.allclose(together, alone, atol=BATCH_TOLERANCE)
    reversed_ = latents(PROMPTS[::-1], (2, 1, 0), 3)
    assert torch.allclose(together, reversed_.flip(0), atol=BATCH_TOLERANCE)
    assert not torch.allclose(together, latents(PROMPTS, (5, 6, 7), 3), atol=0.1)


def test_velocity_error_is_told_per_timestep(setup: SimpleNamespace) -> None:
    reference = observe(setup.pipeline, setup.family, setup.trial)
    noisy = replace(reference, velocities=reference.velocities.clone())
    noisy.velocities[1] += 0.5
    assert velocity_mse(reference, noisy) == pytest.approx([0, 0.25], abs=1e-6)
    assert compare(reference, noisy, setup.trial)["velocity_mse"] == pytest.approx(0.125, abs=1e-6)
    # Beside 3 clips one of another size, whose error is 1 at both: each clip counts alike.
    ones = torch.ones(2, 1, 7)
    several = [replace(seen, other_velocities=(other,)) for seen, other in ((reference, ones), (noisy, 0 * ones))]
    assert velocity_mse(*several) == pytest.approx([1 / 4, (3 * 0.25 + 1) / 4], abs=1e-6)


def test_accuracy_is_asked_of_the_embedded_digits_only(setup: SimpleNamespace) -> None:
    observation = observe(setup.pipeline, setup.family, setup.trial)
    digits = replace(setup.trial, judged=True)
    assert prompt_accuracy(observation, digits).keys() == {"colour", "direction", "digit"} == {*ACCURACIES}
    other = replace(setup.trial, judged=False)  # somebody's own videos, whatever their captions
    assert prompt_accuracy(observation, other) == {}
    assert "colour" not in compare(observation, observation, other)
    with pytest.raises(ValueError, match="a cat"):  # of the digits, so that this is no reason to leave it out
        prompt_accuracy(observation, replace(digits, prompts=("a cat", "a dog", "a horse")))


def test_no_prompts_is_an_error(setup: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        observe(setup.pipeline, setup.family, replace(setup.trial, prompts=(), seeds=()))


def test_a_trial_repeats_captions_with_new_seeds_when_there_are_few() -> None:
    params = load_params(Path(__file__).parents[2] / "params.yaml")
    held_out = LatentDataset(torch.zeros(2, 1), torch.tensor([1, 0]), ["a", "b"], torch.arange(3.0).view(3, 1, 1))
    trial = Trial.from_params(params, held_out)
    assert trial.prompts[:4] == ("b", "a", "b", "a") and len(trial.prompts) == params.evaluate.prompts
    assert len(set(trial.seeds)) == params.evaluate.prompts
    told = Trial.from_params(params, held_out, HunyuanVideoFamily())
    assert trial.predictions_per_video == 2 * told.predictions_per_video
    assert trial.text[:].flatten().tolist() == [1.0, 0.0]


def test_prompts_of_a_file_take_the_place_of_captions(tmp_path: Path) -> None:
    """What only captions of the digits can tell is asked if the file holds nothing else."""
    defaults = load_params(Path(__file__).parents[2] / "params.yaml")
    assert defaults.evaluate.prompts_file is None  # so that the embedded model's prompts are what they were
    digits = [attributes.caption for attributes in ALL_ATTRIBUTES[:3]]
    held_out = LatentDataset(torch.zeros(3, 1), torch.tensor([2, 0, 1]), digits, torch.arange(4.0).view(4, 1, 1))
    captions = Trial.from_params(defaults, held_out)
    assert captions.prompts[:4] == tuple(digits[i] for i in (2, 0, 1, 2)) and captions.judged

    def trial(*prompts: str) -> Trial:
        path = tmp_path / "prompts.txt"
        path.write_text("\n".join(prompts), encoding="utf-8")
        evaluate = defaults.evaluate.model_copy(update={"prompts_file": str(path), "prompts": 5})
        return Trial.from_params(defaults.model_copy(update={"evaluate": evaluate}), held_out)

    own = trial("a cat", digits[0], "🏀, bouncing")
    assert own.prompts == ("a cat", digits[0], "🏀, bouncing", "a cat", digits[0]) and not own.judged
    assert own.seeds == captions.seeds[:5] and len(set(own.seeds)) == 5
    assert own.text[:].flatten().tolist() == captions.text[:].flatten().tolist()  # velocities are those of held-out clips
    assert trial(*digits[:2]).judged
    with pytest.raises(ValueError, match=r"prompts\.txt has no prompts"):
        trial(" ")
    (tmp_path / "prompts.txt").unlink()
    evaluate = defaults.evaluate.model_copy(update={"prompts_file": str(tmp_path / "prompts.txt")})
    with pytest.raises(ValueError, match=r"prompts\.txt does not exist: write a text file with one prompt per line"):
        Trial.from_params(defaults.model_copy(update={"evaluate": evaluate}), held_out)


def test_timesteps_are_spread_over_the_whole_range() -> None:
    assert spread_timesteps(10) == [50.0, 150.0, 250.0, 350.0, 450.0, 550.0, 650.0, 750.0, 850.0, 950.0]
    assert spread_timesteps(1) == [500.0]


def test_two_experts_are_read_together(tmp_path: Path) -> None:
    """Wan 2.2 A14B: one transformer for each half of the noise levels."""
    from diffusers import WanPipeline

    from qvgen.models.wan import WanFamily, tiny_transformer

    one = WanFamily.tiny_pipeline()
    parts = {name: getattr(one, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
    WanPipeline(**parts, transformer_2=tiny_transformer(seed=7), boundary_ratio=0.5).save_pretrained(tmp_path)
    family = WanFamily()

    def make(model: Any) -> torch.Tensor:
        options: dict[str, Any] = {"inference_steps": 4, "guidance_scale": 2.0, "batch_size": 1}
        return sample(model, family, [TINY_PROMPT], [0], TINY_CLIP, **options)[0]

    expected = make(load_pipeline(tmp_path))
    assert torch.equal(make(PipelineFolder(tmp_path)), expected)
    assert not torch.equal(make(load_pipeline(tiny_pipeline("wan", tmp_path / "one"))), expected)
