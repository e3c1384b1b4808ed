"""`qvgen generate`: one video from a prompt, with any diffusers pipeline folder, packed or not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvgen.models.family import SamplingSettings


def generate(model: Path, prompt: str, seed: int, out: Path, **overrides: Any) -> SamplingSettings:
    """Sample one clip and write it to `out` (.mp4, .gif or .png). The same arguments give the same file.

    `overrides`: fields of SamplingSettings; None means the model's own. Raises ValueError or OSError with a
    message for people.
    """
    from qvgen.sampling.settings import check_seed, read_settings
    from qvgen.sampling.video import check_suffix

    check_suffix(out)
    if not prompt.strip():
        raise ValueError("the prompt is empty: say what the video shows")
    check_seed(seed)
    settings = read_settings(model, overrides)

    from qvgen.checkpoint.pipeline import load_pipeline
    from qvgen.models.registry import load_family
    from qvgen.sampling.sample import sample
    from qvgen.sampling.video import write_video

    family, pipeline = load_family(model), load_pipeline(model)
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), desc="denoising")
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
    )
    write_video(out, clips[0], settings.fps)
    return settings
