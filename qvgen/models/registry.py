"""Families by the class of the diffusers pipeline: the only place that lists them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qvgen.models.cogvideox import CogVideoXFamily
from qvgen.models.family import Family
from qvgen.models.files import EXPERT, GENERATION, GUIDANCE, SourceError, read_json, trained_component
from qvgen.models.flux import FluxFamily
from qvgen.models.hunyuan import HunyuanVideoFamily
from qvgen.models.ltx import LTXFamily
from qvgen.models.pixart import PixArtFamily
from qvgen.models.qwen_image import QwenImageFamily
from qvgen.models.sana import SanaFamily
from qvgen.models.stable_diffusion_3 import StableDiffusion3Family
from qvgen.models.wan.image import WanImageFamily
from qvgen.models.wan.text import WanFamily
from qvgen.models.wan.vace import WanVACEFamily
from qvgen.quant.primitives import NUM_TRAIN_TIMESTEPS

_FAMILIES: dict[str, type[Family]] = {}


def register(family: type[Family]) -> type[Family]:
    """Make a family known, under each of its pipeline classes; usable as a decorator.

    Raises ValueError if another family already has the class.
    """
    for pipeline_class in family.pipelines:
        if (known := _FAMILIES.setdefault(pipeline_class, family)) is not family:
            raise ValueError(f"{pipeline_class} already belongs to family {known.name!r}, not to {family.name!r}")
    return family


register(WanFamily)
register(WanImageFamily)
register(WanVACEFamily)
register(CogVideoXFamily)
register(LTXFamily)
register(PixArtFamily)
register(FluxFamily)
register(HunyuanVideoFamily)
register(SanaFamily)
register(QwenImageFamily)
register(StableDiffusion3Family)


def families() -> dict[str, type[Family]]:
    """Every family by its name."""
    return {family.name: family for family in _FAMILIES.values()}


def family_class(pipeline_class: Any) -> type[Family]:
    """The family of a diffusers pipeline class name. Raises SourceError (a ValueError) for one that is not supported."""
    if pipeline_class in _FAMILIES:
        return _FAMILIES[pipeline_class]
    message = f"pipeline {pipeline_class!r:.100} is not supported; supported: {', '.join(_FAMILIES)}. "
    if isinstance(pipeline_class, str) and any(word in pipeline_class for word in _MORE_THAN_TEXT):
        message += "It reads more than text (an image, a video, a mask), which no stage encodes as it does. "
    raise SourceError(message + "Give a supported one, or round this one without training: `qvgen pack`")


_MORE_THAN_TEXT = (
    *("ImageTo", "VideoTo", "Control", "Condition", "Animate", "S2V", "Inpaint"),
    *("Fill", "Img2Img", "Kontext", "Redux", "Framepack", "Edit", "Layered"),
)


def max_timestep(transformer_class: str) -> float:
    """The largest timestep that transformers of a diffusers class are called with."""
    fractions = any(transformer_class in family.fraction_models for family in _FAMILIES.values())
    return 1.0 if fractions else float(NUM_TRAIN_TIMESTEPS)


def family_of(
    pipeline_class: Any, scheduler_config: Mapping[str, Any], index: Mapping[str, Any] = MappingProxyType({})
) -> Family:
    """Adapter for a pipeline class name, the config of its scheduler, and its own settings.

    Raises ValueError for a family that is not supported, and for a scheduler with other noise levels or another target
    than the family's equations have.
    """
    family = family_class(pipeline_class)
    options = _scheduler_defaults(scheduler_config.get("_class_name")) | dict(scheduler_config)
    for name, accepted in family.scheduler_options.items():
        if name in options and options[name] not in accepted:
            allowed = " or ".join(map(repr, accepted))
            raise ValueError(
                f"scheduler option {name} = {options[name]!r:.100} changes noise levels or the target in a way that "
                f"training and evaluation of {family.name} do not follow; it must be {allowed} in scheduler_config.json"
            )
    return family.from_scheduler(options, index)


def load_family(folder: str | Path) -> Family:
    """Adapter for a diffusers pipeline folder, by its model_index.json. Raises ValueError as `family_of` does."""
    folder = Path(folder)
    index = read_json(folder / "model_index.json") | {EXPERT: trained_component(folder)}
    if (folder / GENERATION).is_file() and (scale := read_json(folder / GENERATION).get(GUIDANCE)) is not None:
        index[GUIDANCE] = scale
    elif (family := family_class(index.get("_class_name"))).guidance_is_told:
        index[GUIDANCE] = family.sampling_of(read_json(folder / "transformer" / "config.json")).guidance_scale
    return family_of(index.get("_class_name"), read_json(folder / "scheduler" / "scheduler_config.json"), index)


def family_adapter(pipeline: Any, component: str = "transformer") -> Family:
    """Adapter for a loaded pipeline, of two transformers for `component`."""
    return family_of(type(pipeline).__name__, dict(pipeline.scheduler.config), {**pipeline.config, EXPERT: component})


def _scheduler_defaults(class_name: Any) -> dict[str, Any]:
    """Options that a scheduler has where its config is silent; empty for a class that diffusers does not have."""
    import diffusers

    scheduler = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    if scheduler is None:
        return {}
    parameters = inspect.signature(scheduler.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
