"""Whether a model has latents for clips of a size: asked before anything runs, answered from two config files."""

from __future__ import annotations

from pathlib import Path

from qvgen.models.family import ClipSize
from qvgen.models.files import read_json
from qvgen.models.registry import family_class


def check_size(folder: str | Path, size: ClipSize) -> None:
    """Raises ValueError for clips that the model of a pipeline folder would cut or lengthen, with the nearest possible size.

    A VAE makes one latent frame of a first frame and of every few frames after it, and one latent pixel of a square of
    pixels; the transformer joins latent pixels into patches. A clip that does not fit is cut without a word.
    """
    folder = Path(folder)
    family = family_class(read_json(folder / "model_index.json").get("_class_name"))
    step = family.clip_step(*(read_json(folder / part / "config.json") for part in ("transformer", "vae")))
    faults = []
    if (size.frames - 1) % step.frames or size.frames < 1:
        near = " or ".join(str(n + 1) for n in _nearest(size.frames - 1, step.frames, 0))
        faults.append(f"frames = {size.frames} must be a multiple of {step.frames} and one more: {near}")
    for name, value, unit in (("height", size.height, step.height), ("width", size.width, step.width)):
        if value % unit or value < 1:
            near = " or ".join(map(str, _nearest(value, unit, unit)))
            faults.append(f"{name} = {value} must be a multiple of {unit}: {near}")
    if faults:
        raise ValueError(f"the model in {folder} has no latents for such clips: {'; '.join(faults)}")


def _nearest(value: int, step: int, least: int) -> list[int]:
    """The multiples of `step` just below and above `value` that are at least `least`."""
    below = value // step * step
    return [n for n in (below, below + step) if n >= least] or [least]
