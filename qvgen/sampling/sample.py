"""Samples and predictions of one model, in batches: videos for prompts, velocities on held-out latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from qvgen.models.family import NUM_TRAIN_TIMESTEPS, ClipSize, Family

if TYPE_CHECKING:
    from diffusers import ModelMixin

OnBatch = Callable[[int], object]  # told how many items a finished batch held


def silent(_items: int) -> None:
    pass


@torch.no_grad()
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
) -> torch.Tensor:
    """Latents (n, ...) sampled by a diffusers pipeline; those of all families take the same arguments.

    Each clip has its own seed, so it does not depend on the batch it is generated in (up to floating-point reductions).
    Guidance leads away from `negative_prompt`, and is off from cleanness (1 - t / 1000) `guidance_stop` on. Raises ValueError
    for a stop below 1 with a family whose pipeline fixes guidance before its first step.
    """
    arguments: dict[str, Any] = {}
    if guidance_stop < 1:
        if not family.guidance_can_stop:
            raise ValueError(f"family {family.name} cannot stop guidance on its way; guidance_stop must be 1")
        arguments["callback_on_step_end"] = stop_guidance(guidance_stop)
        arguments["callback_on_step_end_tensor_inputs"] = []
    # In the transformer's dtype, which a text encoder that is stored in 16 bits does not give, and not every pipeline sees to.
    dtype = pipeline.transformer.dtype
    arguments["prompt_embeds"] = family.encode_text(pipeline, prompts, size.max_sequence_length).to(dtype)
    if guidance_scale > 1:
        negative = family.encode_text(pipeline, [negative_prompt] * len(prompts), size.max_sequence_length)
        arguments["negative_prompt_embeds"] = negative.to(dtype)
    return pipeline(
        height=size.height,
        width=size.width,
        num_frames=size.frames,
        max_sequence_length=size.max_sequence_length,
        num_inference_steps=inference_steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **arguments,
    ).frames


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


@torch.no_grad()
def sample(
    pipeline: Any,
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled latents (n, ...) and their clips (n, 3, t, h, w) in [-1, 1], float32 on the CPU, one per prompt.

    Clip i depends on prompts[i] and seeds[i] only (up to floating-point reductions), so two models compared over the
    same prompts and seeds start from the same noise. Raises ValueError for an empty list of prompts.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds; give at least one prompt, a seed for each")
    latents, clips = [], []
    for part in _batches(len(prompts), batch_size):
        sampled = generate(
            pipeline,
            family,
            prompts[part],
            seeds[part],
            size,
            inference_steps=inference_steps,
            guidance_scale=guidance_scale,
            guidance_stop=guidance_stop,
            negative_prompt=negative_prompt,
        )
        latents.append(sampled.float().cpu())
        clips.append(family.decode_latents(pipeline, sampled, size.frames).float().cpu())
        on_batch(len(sampled))
    return torch.cat(latents), torch.cat(clips)


def spread_timesteps(count: int) -> list[float]:
    """`count` timesteps in the middle of equal parts of [0, 1000]: 10 gives 50, 150, ... 950."""
    return [(i + 0.5) * NUM_TRAIN_TIMESTEPS / count for i in range(count)]


@torch.no_grad()
def velocities(
    transformer: ModelMixin,
    family: Family,
    latents: torch.Tensor,
    text: torch.Tensor,
    timesteps: Sequence[float],
    *,
    seed: int,
    batch_size: int,
    on_batch: OnBatch = silent,
) -> torch.Tensor:
    """Predicted velocities (timesteps, n, ...) float32, on the CPU, for clean latents (n, ...) made noisy at each timestep.

    `text` (n, l, d) are the captions' embeddings. The noise depends on `seed` alone, so two models given the same
    arguments see the same inputs. Predictions are kept rather than compared at once, so that two large models need
    never be in memory together.
    """
    dtype, device = transformer.dtype, transformer.device
    generator = torch.Generator().manual_seed(seed)
    predicted = []
    for timestep in timesteps:
        noise = torch.randn(latents.shape, generator=generator)
        for part in _batches(len(latents), batch_size):
            clean = latents[part].to(device).float()
            t = torch.full((len(clean),), float(timestep), device=device)
            noisy = family.add_noise(clean, noise[part].to(device), t)
            predicted.append(family.predict(transformer, noisy.to(dtype), t, text[part].to(device, dtype)).float().cpu())
            on_batch(len(clean))
    return torch.cat(predicted).unflatten(0, (len(timesteps), len(latents)))


def _batches(n: int, batch_size: int) -> list[slice]:
    return [slice(start, start + batch_size) for start in range(0, n, batch_size)]
