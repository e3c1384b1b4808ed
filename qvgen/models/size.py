"""Whether a model has latents for clips of a size: asked before anything runs, answered from two config files."""

from __future__ import annotations

from pathlib import Path

from qvgen.models.family import ClipSize
from qvgen.models.files import read_json
from qvgen.models.registry import family_class

MOST_PIXELS = 2**30  # of a clip, 13 GB in float32: 129 frames of 3840 x 2160


def check_size(folder: str | Path, size: ClipSize) -> None:
    """Raises ValueError for clips that the model of a pipeline folder would cut or lengthen, with the nearest possible size,
    and for a number of text tokens that it does not take.

    A VAE makes one latent frame of a first frame and of every few frames after it, and one latent pixel of a square of
    pixels; the transformer joins latent pixels into patches. A clip that does not fit is cut without a word.
    """
    folder = Path(folder)
    if (pixels := size.frames * size.height * size.width) > MOST_PIXELS:
        raise ValueError(
            f"frames x height x width = {size.frames} x {size.height} x {size.width} = {pixels} pixels, more than "
            f"{MOST_PIXELS}: lower one of them"
        )
    family = family_class(read_json(folder / "model_index.json").get("_class_name"))
    configs = [read_json(folder / part / "config.json") for part in ("transformer", "vae")]
    try:
        step = family.clip_step(*configs)
        units = [unit for unit in vars(step).values() if unit is not None]
        if not all(type(unit) is int and 1 <= unit <= MOST_PIXELS for unit in units):
            raise TypeError(f"{step}")
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        where = " and ".join(f"{part}/config.json" for part in ("transformer", "vae"))
        raise ValueError(f"{where} of {folder} do not say for which clips there are latents ({error!s:.200})") from None
    faults = []
    if step.frames is None:
        faults += [f"frames = {size.frames} must be 1: it makes images"] if size.frames != 1 else []
    elif (size.frames - 1) % step.frames or size.frames < 1:
        near = " or ".join(str(n + 1) for n in _nearest(size.frames - 1, step.frames, 0))
        faults.append(f"frames = {size.frames} must be a multiple of {step.frames} and one more: {near}")
    for name, value, unit in (("height", size.height, step.height), ("width", size.width, step.width)):
        if value % unit or value < 1:
            near = " or ".join(map(str, _nearest(value, unit, unit)))
            faults.append(f"{name} = {value} must be a multiple of {unit}: {near}")
        if step.most is not None and value > step.most:
            faults.append(f"{name} = {value} must be at most {step.most}: it has no positions beyond")
    if faults:
        raise ValueError(f"the model in {folder} has no latents for such clips: {'; '.join(faults)}")
    if (tokens := family.text_tokens(configs[0])) not in (None, size.max_sequence_length):
        raise ValueError(
            f"max_sequence_length = {size.max_sequence_length} must be {tokens}: the model in {folder} has positions for "
            "as many text tokens and takes no other number"
        )


def _nearest(value: int, step: int, least: int) -> list[int]:
    """The multiples of `step` just below and above `value` that are at least `least`."""
    below = value // step * step
    return [n for n in (below, below + step) if n >= least] or [least]
