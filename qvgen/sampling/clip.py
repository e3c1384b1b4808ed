"""One clip as `qvgen generate` and a served model make it: the same arguments give the same bytes in both."""

from __future__ import annotations

import copy
from typing import Any

import torch

from qvgen.models.family import Family, SamplingSettings
from qvgen.sampling.sample import sample


def own_scheduler(pipeline: Any) -> Any:
    """A pipeline over the same weights with a scheduler of its own, which counts steps: for one call among several."""
    twin = copy.copy(pipeline)
    twin.scheduler = copy.deepcopy(pipeline.scheduler)
    return twin


def sample_clip(
    pipeline: Any,
    family: Family,
    settings: SamplingSettings,
    prompt: str,
    seed: int,
    negative_prompt: str = "",
    image: torch.Tensor | None = None,
) -> torch.Tensor:
    """A clip (3, t, h, w) in [-1, 1], float32. `image`: its first frame (3, h, w) uint8, for families that take one."""
    _latents, clips = sample(
        pipeline,
        family,
        [prompt],
        [seed],
        settings.size,
        inference_steps=settings.inference_steps,
        guidance_scale=settings.guidance_scale,
        guidance_stop=settings.guidance_stop,
        batch_size=1,
        negative_prompt=negative_prompt,
        images=None if image is None else image[None],
    )
    return clips[0]
