"""Samples of one model, in batches: videos for prompts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qvgen.checkpoint.pipeline import holding
from qvgen.data.stored import Latents
from qvgen.models.family import ClipSize, Family
from qvgen.quant.primitives import NUM_TRAIN_TIMESTEPS
from qvgen.sampling.one_batch import both_at_once
from qvgen.sampling.pieces import Pieces
from qvgen.sampling.rows import Rows

PIXELS_AT_ONCE = 2**22  # of clips that are decoded together: 20 of the embedded ones are 184,320
OnBatch = Callable[[int], object]  # told how many items a finished batch held


def silent(_: object) -> None:
    pass


Texts = tuple[torch.Tensor, torch.Tensor | None]  # embeddings of a batch, and those that guidance leads away from


@torch.no_grad()
def encode(
    pipeline: Any, family: Family, prompts: Sequence[str], size: ClipSize, guidance_scale: float, negative_prompt: str = ""
) -> Texts:
    """Embeddings (n, l, d) of a batch of prompts, and with guidance as many of the negative prompt. Raises ValueError for a
    negative prompt that the family does not read."""
    if negative_prompt and family.guidance_is_told:
        raise ValueError(f"family {family.name} is told the guidance scale and reads no negative prompt: give none")
    text = family.encode_text(pipeline, prompts, size.max_sequence_length)
    if guidance_scale <= 1 or family.guidance_is_told:
        return text, None
    return text, family.encode_negative(pipeline, [negative_prompt] * len(prompts), size.max_sequence_length)


@torch.no_grad()
def denoise(
    pipeline: Any,
    family: Family,
    texts: Texts,
    seeds: Sequence[int],
    size: ClipSize,
    *,
    inference_steps: int,
    guidance_scale: float,
    guidance_stop: float = 1.0,
    images: torch.Tensor | None = None,
) -> torch.Tensor:
    """Latents (n, ...) of a batch of embeddings; of the pipeline's models the transformer alone is used, or with images also
    VAE and image encoder. See `generate`."""
    if family.reads_image and (images is None or len(images) != len(seeds)):
        found = 0 if images is None else len(images)
        raise ValueError(f"family {family.name} makes videos from first frames: {len(seeds)} images are needed, found {found}")
    if images is not None and not family.reads_image:
        raise ValueError(f"family {family.name} makes videos from text alone: give no image, or an image-to-video model")
    arguments: dict[str, Any] = {}
    if guidance_stop < 1:
        if not family.guidance_can_stop:
            raise ValueError(f"family {family.name} cannot stop guidance on its way; guidance_stop must be 1")
        arguments["callback_on_step_end"] = stop_guidance(guidance_stop)
        arguments["callback_on_step_end_tensor_inputs"] = []
    # In the transformer's dtype, which a text encoder that is stored in 16 bits does not give, and not every pipeline sees to.
    transformer = pipeline.transformer
    text, negative = (None if x is None else x.to(transformer.device, transformer.dtype) for x in texts)
    assert text is not None
    if getattr(getattr(pipeline, "text_encoder", None), "dtype", transformer.dtype) != transformer.dtype:
        pipeline = copy.copy(pipeline)  # without the text encoder, whose dtype some pipelines (PixArt) cast embeddings to
        vars(pipeline)["text_encoder"] = None  # past DiffusionPipeline.__setattr__, which writes to the shared configuration
    # diffusers' pipelines give all clips of a call the same image, so those with one are made one by one.
    calls = [slice(0, len(seeds))] if images is None else batches(len(seeds), 1)
    found = []
    for call in calls:
        generators: Any = [torch.Generator().manual_seed(seed) for seed in seeds[call]]
        if images is not None:
            arguments |= family.image_arguments(images[call][0].to(torch.uint8), size)
            (generators,) = generators  # Wan VACE's pipeline takes no list
        given = text[call], None if negative is None else negative[call]
        latents = both_at_once(pipeline, *given)(
            num_inference_steps=inference_steps,
            generator=generators,
            output_type="latent",
            return_dict=False,
            **{family.guidance_argument: guidance_scale},
            **family.arguments(pipeline, *given, size),
            **arguments,
        )[0]
        found.append(family.unpacked(latents, size))
    return found[0] if len(found) == 1 else torch.cat(found)


def generate(
    pipeline: Any,
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    size: ClipSize,
    *,
    inference_steps: int,
    guidance_scale: float,
    guidance_stop: float = 1.0,
    negative_prompt: str = "",
    images: torch.Tensor | None = None,
) -> torch.Tensor:
    """Latents (n, ...) sampled by a diffusers pipeline; those of all families take the same arguments, and families that make
    videos from a first frame `images` (n, 3, h, w) besides, values 0 to 255.

    Each clip has its own seed, so it does not depend on the batch it is generated in (up to floating-point reductions).
    Guidance leads away from `negative_prompt`, and is off from cleanness (1 - t / 1000) `guidance_stop` on. Raises ValueError
    for a stop below 1 with a family whose pipeline fixes guidance before its first step.
    """
    texts = encode(pipeline, family, prompts, size, guidance_scale, negative_prompt)
    options: dict[str, Any] = {"guidance_scale": guidance_scale, "guidance_stop": guidance_stop, "images": images}
    return denoise(pipeline, family, texts, seeds, size, inference_steps=inference_steps, **options)


def stop_guidance(stop: float) -> Callable[..., dict[str, Any]]:
    """A `callback_on_step_end` for a diffusers pipeline: steps from cleanness (1 - t / 1000) `stop` on take no guidance.

    For pipelines that ask for guidance at each step (`Family.guidance_can_stop`).
    """

    def after_step(pipeline: Any, step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        timesteps = pipeline.scheduler.timesteps
        if step + 1 < len(timesteps) and 1 - float(timesteps[step + 1]) / NUM_TRAIN_TIMESTEPS >= stop:
            pipeline._guidance_scale = 1.0  # what its loop asks; diffusers has no public way
        return {}

    return after_step


def sample(
    model: Any,
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    size: ClipSize,
    *,
    inference_steps: int,
    guidance_scale: float,
    batch_size: int,
    guidance_stop: float = 1.0,
    negative_prompt: str = "",
    on_batch: OnBatch = silent,
    on_denoised: Callable[[Any], object] = silent,
    images: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled latents (n, ...) and their clips (n, 3, t, h, w) in [-1, 1], float32 on the CPU, one per prompt.

    `model`: a pipeline, or a PipelineFolder, of which one part is in memory at a time. Clip i depends on prompts[i] and
    seeds[i] only (up to floating-point reductions), so two models compared over the same prompts and seeds start from the same
    noise. `on_denoised` is given the transformer that made the latents. Raises ValueError for an empty list of prompts.
    """
    texts = encode_all(model, family, prompts, seeds, size, guidance_scale, batch_size, negative_prompt)
    with holding(model, "transformer") as pipeline:
        latents = denoise_all(
            pipeline,
            family,
            texts,
            seeds,
            size,
            inference_steps=inference_steps,
            guidance_scale=guidance_scale,
            batch_size=batch_size,
            guidance_stop=guidance_stop,
            on_batch=on_batch,
            images=images,
        ).tensor()
        on_denoised(pipeline.transformer)
    return latents, decode_all(model, family, latents, size, batch_size)


def encode_all(
    model: Any,
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    size: ClipSize,
    guidance_scale: float,
    batch_size: int,
    negative_prompt: str = "",
    wanted: Collection[int] | None = None,
) -> dict[int, Texts]:
    """Embeddings of batches by their numbers, on the CPU: of every batch, or of those `wanted`."""
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds; give at least one prompt, a seed for each")
    parts, found = batches(len(prompts), batch_size), {}
    if wanted is not None and not wanted:
        return found
    with holding(model, "text_encoder") as pipeline:
        for number in range(len(parts)) if wanted is None else wanted:
            text, negative = encode(pipeline, family, prompts[parts[number]], size, guidance_scale, negative_prompt)
            found[number] = text.cpu(), None if negative is None else negative.cpu()
    return found


def denoise_all(
    pipeline: Any,
    family: Family,
    texts: Mapping[int, Texts],
    seeds: Sequence[int],
    size: ClipSize,
    *,
    inference_steps: int,
    guidance_scale: float,
    batch_size: int,
    guidance_stop: float = 1.0,
    on_batch: OnBatch = silent,
    latents: Pieces | None = None,
    images: Latents | None = None,
) -> Pieces:
    """Latents of the batches of `texts`, each a piece of `latents` if that is given."""
    parts = batches(len(seeds), batch_size)
    latents = latents or Pieces(lengths(len(seeds), batch_size))
    for number, batch in texts.items():
        part = parts[number]
        sampled = denoise(
            pipeline,
            family,
            batch,
            seeds[part],
            size,
            inference_steps=inference_steps,
            guidance_scale=guidance_scale,
            guidance_stop=guidance_stop,
            images=None if images is None else images[part],
        )
        latents.add(number, sampled)
        on_batch(len(sampled))
    return latents


@torch.no_grad()
def decode_all(
    model: Any, family: Family, latents: torch.Tensor, size: ClipSize, batch_size: int, store: Path | None = None
) -> torch.Tensor:
    """Clips (n, 3, t, h, w) of latents. Large ones are decoded one at a time: a VAE computes with many times a clip."""
    at_once = max(1, min(batch_size, PIXELS_AT_ONCE // (size.frames * size.height * size.width)))
    clips = Rows(len(latents), store)
    with holding(model, "vae") as pipeline:
        for part in batches(len(latents), at_once):
            clips.add(family.decode_latents(pipeline, latents[part], size.frames))
    return clips.tensor()


def batches(n: int, batch_size: int) -> list[slice]:
    return [slice(start, start + batch_size) for start in range(0, n, batch_size)]


def lengths(n: int, batch_size: int) -> list[int]:
    """How many items each of `batches` has."""
    return [min(part.stop, n) - part.start for part in batches(n, batch_size)]
