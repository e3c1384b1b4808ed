"""How many frames a second a model was trained with: read from its folder, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from qvgen.models.files import GENERATION, read_json
from qvgen.models.registry import family_class

FASTEST = 1000  # frames a second


def frame_rate(folder: str | Path) -> float:
    """`fps` of the folder's generation.json, else what the family says of such a transformer. Raises ValueError for an entry
    that is no number above 0, at most 1000."""
    folder = Path(folder)
    given = read_json(folder / GENERATION).get("fps") if (folder / GENERATION).is_file() else None
    if given is None:
        family = family_class(read_json(folder / "model_index.json").get("_class_name"))
        return float(family.sampling_of(read_json(folder / "transformer" / "config.json")).fps)
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given <= FASTEST:
        raise ValueError(f"{folder / GENERATION}: fps = {given!r:.100} must be a number above 0, at most {FASTEST}")
    return float(given)
