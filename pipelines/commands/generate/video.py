"""`qvgen generate`: one video from a prompt, with any diffusers pipeline folder, packed or not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvgen.models.family import SamplingSettings


def generate(model: Path, prompt: str, seed: int, out: Path, negative_prompt: str = "", **overrides: Any) -> SamplingSettings:
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

    from qvgen.checkpoint.pipeline import PipelineFolder
    from qvgen.device import resolve_device
    from qvgen.models.registry import load_family
    from qvgen.sampling.clip import sample_clip
    from qvgen.sampling.video import write_video

    bar = {"disable": not sys.stderr.isatty(), "desc": "denoising"}
    pipeline = PipelineFolder(model, resolve_device(), progress=bar)  # one model in memory at a time
    clip = sample_clip(pipeline, load_family(model), settings, prompt, seed, negative_prompt)
    write_video(out, clip, settings.fps)
    return settings
