"""Samples and predictions of one model, in batches: videos for prompts, velocities on held-out latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from qvgen.models.family import NUM_TRAIN_TIMESTEPS, ClipSize, Family, family_of, generate

if TYPE_CHECKING:
    from diffusers import ModelMixin

OnBatch = Callable[[int], object]  # told how many items a finished batch held


def silent(_items: int) -> None:
    pass


def family_adapter(pipeline: Any) -> Family:
    """The adapter of a loaded pipeline."""
    return family_of(type(pipeline).__name__, dict(pipeline.scheduler.config))


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
    on_batch: OnBatch = silent,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled latents (n, ...) and their clips (n, 3, t, h, w) in [-1, 1], float32, one per prompt.

    Clip i depends on prompts[i] and seeds[i] only (up to floating-point reductions), so two models compared over the
    same prompts and seeds start from the same noise. Raises ValueError for an empty list of prompts.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds; give at least one prompt, a seed for each")
    latents, clips = [], []
    for part in _batches(len(prompts), batch_size):
        sampled = generate(
            pipeline,
            prompts[part],
            seeds[part],
            size,
            inference_steps=inference_steps,
            guidance_scale=guidance_scale,
            guidance_stop=guidance_stop,
        )
        latents.append(sampled.float())
        clips.append(family.decode_latents(pipeline, sampled).float())
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
    """Predicted velocities (timesteps, n, ...) float32 for clean latents (n, ...) made noisy at each timestep.

    `text` (n, l, d) are the captions' embeddings. The noise depends on `seed` alone, so two models given the same
    arguments see the same inputs. Predictions are kept rather than compared at once, so that two large models need
    never be in memory together.
    """
    dtype = transformer.dtype
    generator = torch.Generator().manual_seed(seed)
    predicted = []
    for timestep in timesteps:
        noise = torch.randn(latents.shape, generator=generator)
        for part in _batches(len(latents), batch_size):
            clean = latents[part].float()
            t = torch.full((len(clean),), float(timestep))
            noisy = family.add_noise(clean, noise[part], t)
            predicted.append(family.predict(transformer, noisy.to(dtype), t, text[part].to(dtype)).float())
            on_batch(len(clean))
    return torch.cat(predicted).unflatten(0, (len(timesteps), len(latents)))


def _batches(n: int, batch_size: int) -> list[slice]:
    return [slice(start, start + batch_size) for start in range(0, n, batch_size)]
