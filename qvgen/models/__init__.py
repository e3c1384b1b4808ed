"""Model families (Wan, CogVideoX, LTX-Video, Flux, ...): what the library must know about a diffusers pipeline to train and
sample it.

    family = load_family("artifacts/model")        # by model_index.json and the scheduler's config
    noisy = family.add_noise(clean, noise, timestep)
    velocity = family.predict(transformer, noisy, timestep, text)

A family is one file that implements `Family`; `register` makes another one known (docs/add-a-family.md). Where a model comes
from and whether its files are whole is read by source.py, files.py and hashes.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvgen.lazy import lazy

if TYPE_CHECKING:
    from qvgen.models.family import ClipSize, ClipStep, Family, SamplingSettings
    from qvgen.models.registry import families, family_adapter, family_class, load_family, register
    from qvgen.models.size import check_size
    from qvgen.models.source import read_pipeline

__all__ = [
    "ClipSize",
    "ClipStep",
    "Family",
    "SamplingSettings",
    "check_size",
    "families",
    "family_adapter",
    "family_class",
    "load_family",
    "read_pipeline",
    "register",
]

__getattr__ = lazy(
    {
        **dict.fromkeys(("ClipSize", "ClipStep", "Family", "SamplingSettings"), "qvgen.models.family"),
        **dict.fromkeys(("families", "family_adapter", "family_class", "load_family", "register"), "qvgen.models.registry"),
        "check_size": "qvgen.models.size",
        "read_pipeline": "qvgen.models.source",
    }
)
