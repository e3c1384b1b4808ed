"""How a model is meant to be sampled: generation.json beside its model_index.json, else what its family's pipeline uses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qvgen.models.family import SamplingSettings
from qvgen.models.files import GENERATION, read_json
from qvgen.models.registry import family_class
from qvgen.models.size import check_size
from qvgen.models.source import read_pipeline

_TYPES = {field.name: float if field.name.startswith("guidance") else int for field in fields(SamplingSettings)}

_LARGEST = {"inference_steps": 1000, "fps": 1000, "max_sequence_length": 10_000, "guidance_scale": 1000}


def read_settings(model: str | Path, overrides: Mapping[str, Any] = MappingProxyType({})) -> SamplingSettings:
    """Settings of a pipeline folder: `overrides` that are not None, else generation.json, else the family's defaults.

    Raises ValueError for a folder that is not a supported pipeline or damaged, an unknown entry, a value out of range, and a
    clip size that the model has no latents for.
    """
    model = Path(model)
    if not model.is_dir():
        raise ValueError(f"model folder {str(model)!r} does not exist")
    family = family_class(read_pipeline(model).pipeline_class)
    config = read_json(model / "transformer" / "config.json")
    of_model: dict[str, Any] = {}
    if (tokens := family.text_tokens(config)) is not None:
        of_model["max_sequence_length"] = tokens
    values = vars(family.sampling_of(config)) | of_model | _own(model)
    values |= {name: value for name, value in overrides.items() if value is not None}
    for name, kind in _TYPES.items():
        value = values[name]
        number = isinstance(value, int | kind) and not isinstance(value, bool)
        if name == "guidance_stop":
            if not number or not 0 < value <= 1:
                raise ValueError(f"{name} = {value!r:.100} must be a number above 0, at most 1")
        elif not number or not 1 <= value <= _LARGEST.get(name, math.inf):
            most = f", at most {_LARGEST[name]}" if name in _LARGEST else ""
            raise ValueError(f"{name} = {value!r:.100} must be a number, at least 1{most}")
    settings = SamplingSettings(**values)
    check_size(model, settings.size)
    return settings


def read_guidance_stop(folder: str | Path) -> float:
    """The cleanness from which a pipeline folder is meant to be sampled without guidance; 1 (never) unless its
    generation.json says otherwise."""
    return float(_own(Path(folder)).get("guidance_stop", 1.0))


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that torch's generators do not take."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed {seed} must lie between 0 and 2**63 - 1")


def _own(model: Path) -> dict[str, Any]:
    sidecar = model / GENERATION
    own = read_json(sidecar) if sidecar.is_file() else {}
    if unknown := sorted(own.keys() - _TYPES.keys()):
        raise ValueError(f"{sidecar}: unknown entries {unknown!s:.200}; allowed: {', '.join(_TYPES)}")
    return own
