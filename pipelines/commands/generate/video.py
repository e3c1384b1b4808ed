"""`qvgen generate`: one video from a prompt, and of some models a first frame, with any pipeline folder, packed
or not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvgen.models.family import SamplingSettings


def generate(
    model: Path,
    prompt: str,
    seed: int,
    out: Path,
    negative_prompt: str = "",
    image: Path | None = None,
    **overrides: Any,
) -> SamplingSettings:
    """Sample one clip and write it to `out` (.mp4, .gif or .png). The same arguments give the same file.

    `image`: of models that make a video from its first frame that frame, resized to cover and cropped at the centre.
    `overrides`: fields of SamplingSettings; None means the model's own. Raises ValueError or OSError with a
    message for people.
    """
    from qvgen.models.registry import load_family
    from qvgen.sampling.settings import check_seed, read_settings
    from qvgen.sampling.video import check_suffix

    check_suffix(out)
    if not prompt.strip():
        raise ValueError("the prompt is empty: say what the video shows")
    check_seed(seed)
    settings = read_settings(model, overrides)
    family = load_family(model)
    picture = read_image(family, image, settings)

    from qvgen.checkpoint.pipeline import PipelineFolder
    from qvgen.device import resolve_device
    from qvgen.sampling.clip import sample_clip
    from qvgen.sampling.video import write_video

    bar = {"disable": not sys.stderr.isatty(), "desc": "denoising"}
    pipeline = PipelineFolder(model, resolve_device(), progress=bar)  # one model in memory at a time
    clip = sample_clip(pipeline, family, settings, prompt, seed, negative_prompt, picture)
    write_video(out, clip, settings.fps)
    return settings


def read_image(family: Any, path: Path | None, settings: SamplingSettings) -> Any:
    """The first frame (3, h, w) uint8, upright, in the size of the clip; None for a family that takes none. Raises ValueError
    for one too many or too few, and a file that is no picture."""
    from qvgen.sampling.first_frame import read_first_frame

    if family.reads_image and path is None:
        raise ValueError("this model makes a video from its first frame: give it with --image FILE")
    if path is None:
        return None
    if not family.reads_image:
        raise ValueError("this model makes videos from text alone: leave out --image, or give an image-to-video model")
    if not path.is_file():
        raise ValueError(f"--image {path} does not exist")
    return read_first_frame(path, settings)
