"""`qvgen generate`: one video from a prompt, with any diffusers pipeline folder, packed or not."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

DEFAULTS_FILE = "generation.json"  # beside model_index.json: how this model is meant to be sampled


@dataclass(frozen=True)
class Settings:
    """How to sample: the entries of generation.json, and of the flags that override it."""

    frames: int
    height: int  # pixels
    width: int
    max_sequence_length: int  # text tokens the model was trained with
    inference_steps: int
    guidance_scale: float
    fps: int
    guidance_stop: float = 1.0  # cleanness from which sampling goes on without guidance, in (0, 1]; 1: never


# What the families' own pipelines use, for folders without generation.json.
_FAMILY_DEFAULTS = {
    "WanPipeline": Settings(81, 480, 832, 512, 50, 5.0, 16),
    "CogVideoXPipeline": Settings(49, 480, 720, 226, 50, 6.0, 8),
}


def read_settings(model: Path, overrides: dict[str, Any]) -> Settings:
    """Settings of a pipeline folder: `overrides` that are not None, else generation.json, else the family's defaults.

    Raises ValueError for a folder that is not a supported pipeline or damaged, an unknown entry, a value out of range.
    """
    from qvgen.models.source import read_pipeline

    if not model.is_dir():
        raise ValueError(f"model folder {str(model)!r} does not exist")
    pipeline = read_pipeline(model)
    values = vars(_FAMILY_DEFAULTS[pipeline.pipeline_class]).copy()
    types = {field.name: float if field.name.startswith("guidance") else int for field in fields(Settings)}
    sidecar = model / DEFAULTS_FILE
    own = _read_json(sidecar) if sidecar.is_file() else {}
    if unknown := sorted(own.keys() - types.keys()):
        raise ValueError(f"{sidecar}: unknown entries {unknown}; allowed: {', '.join(types)}")
    values |= own | {name: value for name, value in overrides.items() if value is not None}
    for name, kind in types.items():
        value = values[name]
        number = isinstance(value, int | kind) and not isinstance(value, bool)
        if name == "guidance_stop":
            if not number or not 0 < value <= 1:
                raise ValueError(f"{name} = {value!r} must be a number above 0, at most 1")
        elif not number or value < 1:
            raise ValueError(f"{name} = {value!r} must be a number, at least 1")
    return Settings(**values)


def generate(model: Path, prompt: str, seed: int, out: Path, **overrides: Any) -> Settings:
    """Sample one clip and write it to `out` (.mp4, .gif or .png). The same arguments give the same file.

    `overrides`: fields of Settings; None means the model's own. Raises ValueError or OSError with a message for people.
    """
    from qvgen.sampling.video import check_suffix

    check_suffix(out)
    if not prompt.strip():
        raise ValueError("the prompt is empty: say what the video shows")
    check_seed(seed)
    settings = read_settings(model, overrides)

    import qvgen.integrations.diffusers  # noqa: F401  (lets diffusers load packed transformers)
    from qvgen.models.family import ClipSize, load_family, load_pipeline
    from qvgen.sampling.sample import sample
    from qvgen.sampling.video import write_video

    pipeline = load_pipeline(model)
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), desc="denoising")
    size = ClipSize(settings.frames, settings.height, settings.width, settings.max_sequence_length)
    _latents, clips = sample(
        pipeline,
        load_family(model),
        [prompt],
        [seed],
        size,
        inference_steps=settings.inference_steps,
        guidance_scale=settings.guidance_scale,
        guidance_stop=settings.guidance_stop,
        batch_size=1,
    )
    write_video(out, clips[0], settings.fps)
    return settings


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that torch's generators do not take."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed {seed} must lie between 0 and 2**63 - 1")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, found {type(content).__name__}")
    return content
