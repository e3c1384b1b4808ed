"""Facts of the families: which clips they have latents for, which schedulers and variants they refuse."""

import ast
import json
import math
import re
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

from qvgen.checkpoint.pipeline import ENCODERS, load_pipeline
from qvgen.models.family import ClipSize, ClipStep, Family
from qvgen.models.pictures import as_clips
from qvgen.models.registry import families, family_adapter, family_of, load_family
from qvgen.models.size import check_size
from qvgen.models.tiny import TINY_CLIP, TINY_IMAGE, TINY_PROMPT, tiny_pipeline
from qvgen.models.wan.vace import MASK_CHANNELS
from qvgen.nn.timestep import timestep_of
from qvgen.sampling import one_batch
from qvgen.sampling.sample import generate, sample
from tests.support.families import KINDS, make_kind

ROOT = Path(__file__).parents[3]
WAN_2_2_5B = {"patch_size": [1, 2, 2]}, {"scale_factor_temporal": 4, "scale_factor_spatial": 16}
VARIANTS = (*KINDS, "rotary", "temporal_patch")
ONE_EACH = [name for name, kind in KINDS.items() if name == kind.family and not name.startswith("wan_")]
IMAGES = torch.cat([*torch.randint(256, (2, 1, 3, 32, 32), generator=torch.Generator().manual_seed(0))], dim=-1)
STEP_TOLERANCE = 1e-5
PADDED = 24  # text tokens, more than the prompt has


@pytest.fixture(scope="module", params=VARIANTS)
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("pipeline") / request.param
    if request.param in KINDS:
        make_kind(request.param, folder)
    else:
        tiny_pipeline("cogvideox", folder, **{request.param: True})
    return load_pipeline(folder)


def images(family: Family, size: ClipSize = TINY_CLIP) -> dict[str, Any]:
    return {"images": IMAGES[..., : size.width]} if family.reads_image else {}


def read(seen: dict[str, torch.Tensor]) -> torch.Tensor:
    """Latents as a family has them, of what a pipeline gave its transformer: Wan VACE's control apart, and a mask after it."""
    control = seen.get("control_hidden_states")
    return seen["hidden_states"] if control is None else torch.cat([seen["hidden_states"], control[:, :-MASK_CHANNELS]], dim=1)


def step_of(pipeline: Any) -> ClipStep:
    return family_adapter(pipeline).clip_step(pipeline.transformer.config, pipeline.vae.config)


def tiny(pipeline: Any) -> ClipSize:
    return TINY_IMAGE if step_of(pipeline).frames is None else TINY_CLIP


def oblong(pipeline: Any) -> ClipSize:
    """A small clip whose latents have several frames, rows and columns, not as many of each."""
    step = step_of(pipeline)
    columns = 2 if "sample_width" in pipeline.transformer.config else 4  # CogVideoX 1.5 has no positions beyond
    tokens = family_adapter(pipeline).text_tokens(pipeline.transformer.config) or PADDED
    return ClipSize(1 + 2 * (step.frames or 0), 2 * step.height, columns * step.width, tokens)


def test_a_clip_has_as_many_frames_as_were_asked_for(pipeline: Any) -> None:
    """CogVideoX 1.5 (temporal_patch) once gave 16 for 9: its latents are padded in front."""
    family = family_adapter(pipeline)
    options: dict[str, Any] = {"inference_steps": 1, "guidance_scale": 1.0, "batch_size": 1, **images(family)}
    for frames in (1, 9, 17) if step_of(pipeline).frames else (1,):
        _, clips = sample(pipeline, family, [TINY_PROMPT], [0], ClipSize(frames, 32, 32, 8), **options)
        assert clips.shape == (1, 3, frames, 32, 32)
        with torch.no_grad():
            latents = family.encode_clips(pipeline, clips.clamp(-1, 1))
            assert family.decode_latents(pipeline, latents, frames).shape == clips.shape


def test_decoding_is_the_pipelines_own(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_batch, "MOST_TOKENS", 0)  # steps are the pipeline's own too
    family, size = family_adapter(pipeline), tiny(pipeline)
    negative = "" if family.guidance_is_told else "a digit"
    arguments: dict[str, Any] = {"inference_steps": 2, "guidance_scale": 2.0, "negative_prompt": negative}
    _, clips = sample(pipeline, family, [TINY_PROMPT], [3], size, batch_size=1, **arguments, **images(family))
    given: dict[str, Any] = family.image_arguments(IMAGES[0, ..., :32].to(torch.uint8), size) if family.reads_image else {}
    length = 512 if getattr(pipeline, "image_encoder", None) is not None else 8  # that diffusers' transformer needs there
    given |= {"num_frames": size.frames} if size.frames > 1 else {}
    given |= {"use_resolution_binning": False} if "use_resolution_binning" in signature(pipeline.__call__).parameters else {}
    own = pipeline(
        **given | {family.guidance_argument: 2.0},
        prompt=TINY_PROMPT,
        negative_prompt=negative,
        height=32,
        width=32,
        max_sequence_length=length,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        return_dict=False,
    )[0]
    assert torch.allclose(own.view_as(clips.transpose(1, 2)) * 2 - 1, clips.clamp(-1, 1).transpose(1, 2), atol=1e-5)


def test_a_pipeline_denoises_with_the_familys_velocity(pipeline: Any) -> None:
    """The first step of the pipeline is the scheduler's step along `predict`."""
    family, seen, size = family_adapter(pipeline), {}, oblong(pipeline)
    told = getattr(family, "guidance_scale", 1.0)  # what `predict` tells
    options: dict[str, Any] = {"inference_steps": 1, "guidance_scale": told, **images(family, size)}
    first = generate(pipeline, family, [TINY_PROMPT], [0], size, **options)
    names = ("hidden_states",)  # which PixArt's pipeline does not say
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _m, args, given: seen.update(given, **dict(zip(names, args, strict=False))), with_kwargs=True
    )
    generate(pipeline, family, [TINY_PROMPT], [0], size, **options)
    hook.remove()
    noise, timestep = family.unpacked(read(seen), size), timestep_of(pipeline.transformer, seen["timestep"])
    with torch.no_grad():
        text = family.encode_text(pipeline, [TINY_PROMPT], size.max_sequence_length)
        image = family.encode_image(pipeline, as_clips(IMAGES[..., : size.width].to(torch.uint8)))
        velocity = family.predict(pipeline.transformer, noise, timestep, text, image)
    moving = {"mu": 0.0} if pipeline.scheduler.config.get("use_dynamic_shifting") else {}  # of one step: none
    pipeline.scheduler.set_timesteps(1, **moving)
    sample_of_step = noise[:, : velocity.shape[1]]
    expected = pipeline.scheduler.step(velocity, pipeline.scheduler.timesteps[0], sample_of_step, return_dict=False)[0]
    assert torch.allclose(first, expected, atol=STEP_TOLERANCE)


@pytest.mark.parametrize("pipeline", ONE_EACH, indirect=True)
def test_noise_and_targets_are_the_schedulers(pipeline: Any) -> None:
    """A step along the target leads from what `add_noise` gives at a level to what it gives at the next."""
    family, scheduler = family_adapter(pipeline), pipeline.scheduler
    scheduler.set_timesteps(5, **({"mu": 0.5} if scheduler.config.get("use_dynamic_shifting") else {}))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(2)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1, 4, 3, 4, 4, generator=generator) for _ in range(2))
    before, after = (scheduler.timesteps[i : i + 1].float() for i in (2, 3))
    noisy, target = family.add_noise(clean, noise, before), family.target(clean, noise, before)
    stepped = scheduler.step(target, scheduler.timesteps[2], noisy).prev_sample
    torch.testing.assert_close(stepped, family.add_noise(clean, noise, after), rtol=0, atol=STEP_TOLERANCE)
    assert (stepped - noisy).abs().mean() > 0.1


@pytest.mark.parametrize("pipeline", [name for name in KINDS if name.startswith(("wan_image", "wan_vace"))], indirect=True)
def test_training_reads_of_the_first_frame_what_the_pipeline_reads(pipeline: Any) -> None:
    """Whatever of the transformer's input is not noise is the same, for a clip that begins with the image."""
    family, seen = family_adapter(pipeline), {}
    hook = pipeline.transformer.register_forward_pre_hook(lambda _m, _a, given: seen.update(given), with_kwargs=True)
    options: dict[str, Any] = {"inference_steps": 1, "guidance_scale": 1.0, **images(family)}
    generate(pipeline, family, [TINY_PROMPT], [0], TINY_CLIP, **options)
    hook.remove()
    first = as_clips(IMAGES[..., :32].to(torch.uint8))
    clips = torch.cat([first, torch.rand(1, 3, 8, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1], dim=2)
    with torch.no_grad():
        clean, image = family.encode_clips(pipeline, clips), family.encode_image(pipeline, clips)
    noise, timestep = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2)), torch.tensor([1000.0])
    noisy, target = family.add_noise(clean, noise, timestep), family.target(clean, noise, timestep)
    kept = noisy == clean
    assert 0 < kept.float().mean() < 1
    torch.testing.assert_close(noisy[kept], read(seen).broadcast_to(kept.shape)[kept], rtol=0, atol=STEP_TOLERANCE)
    assert torch.equal(noisy[~kept], noise[~kept])
    if seen["timestep"].ndim == 2:  # tokens of 2 x 2 latent pixels, of which the first frame's are clean and have no velocity
        assert torch.equal(seen["timestep"][0] == 0, kept[0, 0, :, ::2, ::2].flatten()) and target[kept].count_nonzero() == 0
    given = seen.get("encoder_hidden_states_image")
    assert image.shape[1] == 0 if given is None else torch.allclose(image, given, atol=STEP_TOLERANCE)


def test_a_transformer_that_is_told_its_guidance(tmp_path: Path) -> None:
    """As generation.json says, or else as the family is sampled; it reads no negative prompt."""
    folder = make_kind("flux", tmp_path / "model")
    assert getattr(load_family(folder), "guidance_scale", None) == 3.5
    assert getattr(load_family(make_kind("flux_schnell", tmp_path / "schnell")), "guidance_scale", None) == 1.0
    for value, accepted in ((2, True), (0.5, False), ("3", False), (True, False), (float("nan"), False)):
        (folder / "generation.json").write_text(json.dumps({"guidance_scale": value}))
        if accepted:
            assert getattr(load_family(folder), "guidance_scale", None) == value
            continue
        with pytest.raises(ValueError, match=r"generation.json: guidance_scale = .* must be a number, at least 1"):
            load_family(folder)
    options: dict[str, Any] = {"inference_steps": 1, "guidance_scale": 3.0, "negative_prompt": "blue"}
    with pytest.raises(ValueError, match="family flux is told the guidance scale and reads no negative prompt"):
        generate(load_pipeline(folder), families()["flux"].from_scheduler({}), [TINY_PROMPT], [0], TINY_IMAGE, **options)


def test_schnell_is_sampled_as_its_card_says() -> None:
    family = families()["flux"]
    assert family.sampling_of(family.published[1]) == family.sampling
    schnell = family.sampling_of({})
    assert (schnell.inference_steps, schnell.guidance_scale, schnell.max_sequence_length) == (4, 1.0, 256)


@pytest.mark.parametrize("component", ["transformer", "transformer_2"])
def test_an_expert_trains_on_its_own_noise_levels(component: str) -> None:
    index = {"boundary_ratio": 0.875, "expert": component}
    family = family_of("WanPipeline", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, index)
    whole = family_of("WanPipeline", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    low, high = (875, 1000) if component == "transformer" else (0, 875)
    drawn = family.sample_timesteps(400_000, torch.Generator().manual_seed(0))
    assert low <= drawn.min() < low + 5 and high - 5 < drawn.max() <= high
    everything = whole.sample_timesteps(400_000, torch.Generator().manual_seed(1))
    own = everything[(everything >= low) & (everything < high)]  # as the whole model trains, restricted
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(drawn.quantile(quantiles), own.quantile(quantiles), rtol=0.02, atol=0)
    ends = family.timesteps_at(torch.tensor([0.0, 0.5, 1.0]), uniform=True)
    assert ends.tolist() == pytest.approx([low, (low + high) / 2, high])


@pytest.mark.parametrize("family_name", ONE_EACH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_text_encoder_stored_in_16_bits_samples(family_name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family = families()[family_name]
    whole = family.tiny_pipeline()
    encoders = [name for name in ENCODERS if hasattr(whole, name)]
    for name in encoders:
        getattr(whole, name).to(dtype)
    whole.save_pretrained(tmp_path / "model")
    loaded = load_pipeline(tmp_path / "model")
    assert {getattr(loaded, name).dtype for name in encoders} == {dtype} and loaded.transformer.dtype == torch.float32
    arguments: dict[str, Any] = {"inference_steps": 1, "guidance_scale": 2.0, "batch_size": 1}
    latents, _ = sample(loaded, family_adapter(loaded), [TINY_PROMPT], [0], tiny(loaded), **arguments)
    assert latents.isfinite().all() and latents.dtype == torch.float32


def test_clip_steps_are_vae_factor_times_patch() -> None:
    wan, cogvideox, ltx, pixart = (families()[name] for name in ("wan", "cogvideox", "ltx", "pixart"))
    flux, hunyuan = families()["flux"], families()["hunyuan_video"]
    assert flux.clip_step({}, {"block_out_channels": (128, 256, 512, 512)}) == ClipStep(None, 16, 16)
    assert hunyuan.clip_step({}, {}) == ClipStep(4, 16, 16)
    assert wan.clip_step({}, {}) == ClipStep(4, 16, 16)
    assert wan.clip_step(*WAN_2_2_5B) == ClipStep(4, 32, 32)
    assert cogvideox.clip_step({}, {}) == ClipStep(8, 16, 16)
    assert ltx.clip_step({}, {}) == ClipStep(8, 32, 32)
    deeper = {"spatio_temporal_scaling": [True] * 4, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    assert ltx.clip_step({}, deeper) == ClipStep(8, 32, 32)  # 0.9.5 and later
    with pytest.raises(ValueError, match="joins 8 frames and 16 pixels, those of LTX-Video 8 and 32"):
        ltx.clip_step({}, {"patch_size": 2})
    assert pixart.clip_step({}, {"block_out_channels": (128, 256, 512, 512)}) == ClipStep(None, 16, 16)
    assert "has 80 channels; those of a masked video are 96" in (
        families()["wan_vace"].refusal({}, {"vace_in_channels": 80}) or ""
    )
    assert families()["wan_vace"].refusal({}, {"vace_layers": [0], "in_channels": 16}) is None
    assert "told the size of the image" in (pixart.refusal({}, {"sample_size": 128}) or "")  # PixArt-alpha
    assert pixart.refusal({}, {"sample_size": 128, "use_additional_conditions": False}) is None
    assert "384 input channels for 64" in (flux.refusal({}, {"in_channels": 384, "out_channels": 64}) or "")  # Fill
    assert flux.refusal({}, flux.published[1]) is hunyuan.refusal({}, hunyuan.published[1]) is None
    assert "image_condition_type = 'token_replace'" in (hunyuan.refusal({}, {"image_condition_type": "token_replace"}) or "")
    sana, qwen = families()["sana"], families()["qwen_image"]
    assert sana.clip_step({}, {}) == ClipStep(None, 32, 32) and sana.refusal({}, {"patch_size": 1}) is None
    assert "distilled to a few steps" in (sana.refusal({}, {"guidance_embeds": True}) or "")  # Sana Sprint
    assert qwen.clip_step({}, {}) == ClipStep(None, 16, 16) and qwen.refusal({}, {"guidance_embeds": False}) is None
    assert "reads more than an image's latents" in (qwen.refusal({}, {"use_layer3d_rope": True}) or "")  # Qwen-Image-Layered
    sd3 = families()["stable_diffusion_3"]
    assert "an image beside the noise (33 input channels for 16)" in (sd3.refusal({}, {"in_channels": 33}) or "")
    assert sd3.refusal({}, {}) is None
    scales = [sd3.sampling_of(config).guidance_scale for config in ({}, {"qk_norm": "rms_norm"}, sd3.published[1])]
    assert scales == [7.0, 3.5, 4.5]  # 3 Medium, 3.5 Large, 3.5 Medium
    with pytest.raises(ValueError, match="joins 16 pixels, that of Qwen-Image 8"):
        qwen.clip_step({}, {"temperal_downsample": [True] * 4})
    assert "patches of [2, 1]" in (ltx.refusal({}, {"patch_size": 2}) or "") and ltx.refusal({}, {}) is None


@pytest.mark.parametrize(
    ("index", "config", "says"),
    [
        ({"boundary_ratio": 0.9}, {}, "boundary_ratio = 0.9, and no transformer_2 for the levels below"),
        ({"transformer_2": ["diffusers", "X"]}, {}, "boundary_ratio = None must be a number between 0 and 1"),
        ({"transformer_2": ["diffusers", "X"], "boundary_ratio": True}, {}, "boundary_ratio = True must be a number"),
        ({}, {"in_channels": 16}, "16 input channels for 16; a first frame takes 36"),
        ({"expand_timesteps": True}, {"in_channels": 36}, "36 input channels for 16; a first frame takes 16"),
        ({}, {"in_channels": 36, "image_dim": 1280}, "attends to embeddings of the image .* there is no image_encoder"),
        ({}, {"in_channels": 36, "pos_embed_seq_len": 514}, "reads a first and a last frame"),
    ],
)
def test_what_a_family_refuses(index: dict[str, Any], config: dict[str, Any], says: str) -> None:
    assert re.search(says, families()["wan_image"].refusal(index, config) or "")
    whole = {"image_encoder": ["transformers", "CLIPVisionModel"]}
    assert families()["wan_image"].refusal(whole, {"in_channels": 36, "image_dim": 1280}) is None


@pytest.mark.parametrize(
    ("family_name", "size", "says"),
    [
        ("wan", (8, 32, 32), "frames = 8 must be a multiple of 4 and one more: 5 or 9"),
        ("wan", (9, 40, 80), "height = 40 must be a multiple of 16: 32 or 48"),
        ("wan", (9, 32, 8), "width = 8 must be a multiple of 16: 16"),
        ("wan", (2, 33, 33), "1 or 5; height = 33 must be a multiple of 16: 32 or 48; width = 33"),
        ("ltx", (5, 32, 32), "frames = 5 must be a multiple of 8 and one more: 1 or 9"),
        ("pixart", (9, 32, 32), "frames = 9 must be 1: it makes images"),
        ("stable_diffusion_3", (1, 128, 144), "clips: width = 144 must be at most 128: it has no positions beyond"),
        ("flux", (1, 40, 32), "height = 40 must be a multiple of 16: 32 or 48"),
        ("hunyuan_video", (8, 32, 32), "frames = 8 must be a multiple of 4 and one more: 5 or 9"),
        ("cogvideox", (5, 32, 32), "frames = 5 must be a multiple of 8 and one more: 1 or 9"),
    ],
)
def test_other_sizes_are_refused_with_the_nearest(tmp_path: Path, family_name: str, size: Any, says: str) -> None:
    folder = tiny_pipeline(family_name, tmp_path / "model")
    check_size(folder, KINDS[family_name].clip)
    with pytest.raises(ValueError, match="has no latents for such clips") as error:
        check_size(folder, ClipSize(*size, 8))
    assert says in str(error.value)


def test_a_number_of_text_tokens_that_the_transformer_has_no_positions_for(tmp_path: Path) -> None:
    size = replace(TINY_CLIP, max_sequence_length=TINY_CLIP.max_sequence_length + 1)
    for name, options in (("wan", {}), ("cogvideox", {"rotary": True})):
        check_size(tiny_pipeline(name, tmp_path / name, **options), size)
    with pytest.raises(ValueError, match=r"max_sequence_length = 9 must be 8: .* takes no other number"):
        check_size(tiny_pipeline("cogvideox", tmp_path / "sincos"), size)


def test_the_5b_layout_takes_multiples_of_32(tmp_path: Path) -> None:
    folder = tiny_pipeline("wan", tmp_path / "model")
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scale_factor_spatial": 16}))
    with pytest.raises(ValueError, match=r"height = 48 must be a multiple of 32: 32 or 64; width = 80 .* 64 or 96"):
        check_size(folder, ClipSize(9, 48, 80, 8))
    check_size(folder, ClipSize(9, 64, 96, 8))


EULER, UNIPC = {"_class_name": "FlowMatchEulerDiscreteScheduler"}, {"_class_name": "UniPCMultistepScheduler"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
DDIM = {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    ("pipeline_class", "config"),
    [
        ("WanPipeline", EULER | {"shift": 3.0}),
        ("WanPipeline", EULER | {"use_karras_sigmas": None, "shift_terminal": None}),
        ("WanPipeline", UNIPC | FLOW | {"flow_shift": 3.0, "solver_order": 2}),
        ("PixArtSigmaPipeline", {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "linear"}),
        ("LTXPipeline", EULER | {"shift": 1.0, "use_dynamic_shifting": True, "max_shift": 2.05, "shift_terminal": 0.1}),
        ("FluxPipeline", EULER | {"shift": 3.0, "use_dynamic_shifting": True, "max_shift": 2.05}),
        ("HunyuanVideoPipeline", EULER | {"shift": 7.0}),
        ("SanaPipeline", {"_class_name": "DPMSolverMultistepScheduler", "flow_shift": 3.0} | FLOW),
        ("QwenImagePipeline", EULER | {"use_dynamic_shifting": True, "max_shift": 0.9, "shift_terminal": 0.02}),
        ("CogVideoXPipeline", DDIM | {"snr_shift_scale": 1.0}),
        ("CogVideoXPipeline", {"_class_name": "CogVideoXDPMScheduler", "prediction_type": "v_prediction"}),
    ],
)
def test_schedulers_that_training_follows(pipeline_class: str, config: dict[str, Any]) -> None:
    family = family_of(pipeline_class, config)
    if config.get("use_dynamic_shifting"):
        # As the sampler shifts for the most tokens.
        assert float(family.timesteps_at(torch.tensor([0.5]))) == pytest.approx(1000 / (1 + math.exp(-config["max_shift"])))
    elif hasattr(family, "shift"):
        assert family.shift == config.get("shift", config.get("flow_shift", 1.0))


@pytest.mark.parametrize(
    ("pipeline_class", "config", "option"),
    [
        ("WanPipeline", EULER | {"use_dynamic_shifting": True}, "use_dynamic_shifting = True"),
        ("WanPipeline", EULER | {"use_karras_sigmas": True}, "use_karras_sigmas = True"),
        ("WanPipeline", EULER | {"use_exponential_sigmas": True}, "use_exponential_sigmas = True"),
        ("WanPipeline", EULER | {"use_beta_sigmas": True}, "use_beta_sigmas = True"),
        ("WanPipeline", EULER | {"shift_terminal": 0.1}, "shift_terminal = 0.1"),
        ("WanPipeline", EULER | {"invert_sigmas": True}, "invert_sigmas = True"),
        ("WanPipeline", EULER | {"num_train_timesteps": 500}, "num_train_timesteps = 500"),
        ("WanPipeline", EULER | {"shift": 0}, "shift = 0 must be a number above 0"),
        ("SanaPipeline", UNIPC | FLOW | {"flow_shift": "3"}, "flow_shift = '3' must be a number above 0"),
        ("FluxPipeline", EULER | {"use_dynamic_shifting": True, "max_shift": 900}, "max_shift = 900 must be a number"),
        ("QwenImagePipeline", EULER | {"use_dynamic_shifting": True, "max_shift": None}, "max_shift = None must be a number"),
        ("PixArtSigmaPipeline", EULER, "'FlowMatchEulerDiscreteScheduler' has no beta_schedule"),
        ("PixArtSigmaPipeline", DDIM, "prediction_type = 'v_prediction'"),
        ("LTXPipeline", EULER | {"time_shift_type": "linear"}, "time_shift_type = 'linear'"),
        ("FluxPipeline", EULER | {"shift_terminal": 0.1}, "shift_terminal = 0.1"),
        ("HunyuanVideoPipeline", EULER | {"use_dynamic_shifting": True}, "use_dynamic_shifting = True"),
        ("WanPipeline", UNIPC | {"prediction_type": "flow_prediction"}, "use_flow_sigmas = False"),
        ("WanPipeline", UNIPC | {"use_flow_sigmas": True}, "prediction_type = 'epsilon'"),
        ("CogVideoXPipeline", DDIM | {"prediction_type": "epsilon"}, "prediction_type = 'epsilon'"),
        ("CogVideoXPipeline", DDIM | {"prediction_type": "sample"}, "prediction_type = 'sample'"),
        ("CogVideoXPipeline", {"_class_name": "CogVideoXDDIMScheduler"}, "prediction_type = 'epsilon'"),
    ],
)
def test_other_noise_levels_and_targets_are_refused(pipeline_class: str, config: dict[str, Any], option: str) -> None:
    with pytest.raises(ValueError, match=r"changes noise levels or the target|must be a number") as error:
        family_of(pipeline_class, config)
    assert option in str(error.value)


def test_no_family_is_named_outside_its_own_file() -> None:
    own = {f"qvgen/models/{name}.py" for name in ("wan/image", "wan/vace", "registry")}
    folders = {family.__module__.split(".")[2] for family in families().values()}
    own |= {f"qvgen/models/{folder}/{name}.py" for folder in folders for name in ("__init__", "text")}
    own.add("qvgen/integrations/fused/wan.py")
    words = ("WanTransformer3DModel", "LTXVideoTransformer3DModel", "PixArtTransformer2DModel", "FluxTransformer2DModel")
    words += ("SanaTransformer2DModel",)
    words += tuple(name for family in families().values() for name in (family.__name__, *family.pipelines))
    named = {
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in ("qvgen", "stages", "comparison", "pipelines")
        for path in (ROOT / package).rglob("*.py")
        if str(path.relative_to(ROOT)) not in own
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Name) and node.id in words)
        or (isinstance(node, ast.Constant) and node.value in words)
        or (isinstance(node, ast.alias) and node.name in words)
    }
    assert named == set()
