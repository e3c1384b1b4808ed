"""Loading from a diffusers pipeline folder, packed or not: a whole pipeline, or its transformer alone.

Every model file of the project is read here, by one rule: local files, safetensors only, so that nothing is downloaded and
nothing unpickled. safetensors are memory-mapped: a weight takes memory once.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import qvgen.integrations.diffusers  # noqa: F401  (lets diffusers load packed transformers)
from qvgen.checkpoint.declared import check_packed
from qvgen.device import release_memory
from qvgen.models.files import DENOISERS, read_json, trained_component
from qvgen.models.registry import families

PARTS = ("text_encoder", "vae", "transformer")  # what a pipeline has of models: the rest is small
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")  # read and released together, as the part "text_encoder"
EXPERT = "transformer_2"  # read with the transformer: Wan 2.2 A14B has one for each half of the noise levels
IMAGE_ENCODER = "image_encoder"  # read where it is asked for, and with the transformer of a pipeline that is given an image


def load_pipeline(
    folder: str | Path,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    device: torch.device | str | None = None,
    shared: Mapping[str, Any] | None = None,
) -> Any:
    """The diffusers pipeline of a folder in evaluation mode, on `device` (None: the CPU), but for the components in `shared`,
    which are taken instead of those of the folder.

    `dtype`: of the parameters, packed layers excepted, or one per component ("default": of the rest); None: float32, text
    encoders as they are stored. Raises ValueError if config.json of a packed transformer does not describe what is beside it.
    """
    from diffusers import DiffusionPipeline

    for component in DENOISERS:
        if (Path(folder) / component / "config.json").is_file():
            check_packed(Path(folder) / component)
    _without_bars()
    given: dict[str, Any] = {"dtype": dtype, **(shared or {})}
    pipeline = DiffusionPipeline.from_pretrained(Path(folder), local_files_only=True, use_safetensors=True, **given)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline if device is None else pipeline.to(device)


def _without_bars() -> None:
    """Of libraries, for files that load in milliseconds."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def load_parts(folder: str | Path, parts: Collection[str], device: torch.device | str) -> Any:
    """The pipeline of a folder with some of its models, `parts` of PARTS or IMAGE_ENCODER, on `device`, text encoders as
    they are stored, the others in float32. Of those that are not read the encoders and the VAE are None, and the transformer
    is there without its weights (on the meta device), because pipelines read its config. A pipeline that is given an image
    encodes it when it denoises, so the transformer comes with VAE and image encoder there."""
    import diffusers

    _without_bars()
    index, components = read_json(Path(folder) / "model_index.json"), {}
    read = set(parts)
    if "text_encoder" in parts:
        read |= {*ENCODERS}
    if "transformer" in parts:
        read |= {EXPERT, "vae", IMAGE_ENCODER} if _reads_image(index) else {EXPERT}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if not isinstance(value, list):  # a setting of the pipeline
            components[name] = value
        elif value[0] is None or (name in (*ENCODERS, EXPERT, IMAGE_ENCODER) and name not in read):
            components[name] = None
        elif name in read and name in ("transformer", EXPERT):
            components[name] = load_transformer(folder, device=device, component=name)
        elif name in PARTS and name not in read:
            components[name] = _without_weights(folder, name, value[1])
        else:
            components[name] = load_component(folder, name)
        if name in read and components[name] is not None:
            components[name] = components[name].eval().to(device)
    pipeline = getattr(diffusers, index["_class_name"])(**components)
    if "vae" not in read:
        pipeline.vae = None  # its factors have been read, and a pipeline computes where its first model is
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _reads_image(index: Mapping[str, Any]) -> bool:
    return any(index.get("_class_name") in family.pipelines and family.reads_image for family in families().values())


def _without_weights(folder: str | Path, name: str, class_name: str) -> Any:
    import diffusers

    found = transformer_class(folder) if name == "transformer" else getattr(diffusers, class_name)
    config = {k: v for k, v in read_json(Path(folder) / name / "config.json").items() if k != "quantization_config"}
    with torch.device("meta"):
        return found.from_config(config).eval()


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline of which one model is in memory at a time: a text encoder may be larger than what it feeds.

    `change_` is applied to the transformer when it is loaded, of two to the one that is trained, as to quantize it.
    `tiling`: the VAE decodes in tiles, whose seams are blended. `progress`: options of the pipeline's bar.
    """

    folder: str | Path
    device: torch.device | str = "cpu"
    change_: Callable[[Any], object] = lambda transformer: None
    tiling: bool = False
    progress: Mapping[str, Any] = field(default_factory=lambda: {"disable": True})


@contextmanager
def holding(model: Any, part: str) -> Iterator[Any]:
    """A pipeline that has `part` of PARTS, and no other of them if `model` is a PipelineFolder; `part` is released when the
    block ends. A pipeline that is loaded already stays as it is."""
    if not isinstance(model, PipelineFolder):
        yield model
        return
    pipeline = load_parts(model.folder, (part,), model.device)
    if part == "transformer":
        model.change_(getattr(pipeline, trained_component(model.folder)))
        pipeline.set_progress_bar_config(**model.progress)
    if part == "vae" and model.tiling:
        pipeline.vae.enable_tiling()
    try:
        yield pipeline
    finally:
        held = weakref.ref(getattr(pipeline, part))
        setattr(pipeline, part, None)
        beside = {"transformer": ("vae", EXPERT, IMAGE_ENCODER), "text_encoder": ENCODERS}
        for other in beside.get(part, ()):
            if getattr(pipeline, other, None) is not None:
                setattr(pipeline, other, None)
        release_memory(torch.device(model.device), held() is not None)


def load_transformer(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    component: str = "transformer",
) -> Any:
    """The transformer of a pipeline folder, in evaluation mode, on `device` (None: the CPU); no other component is read.

    `component`: of pipelines with two experts, "transformer_2" is the other one. `dtype`: of the parameters, packed layers
    excepted; None: float32. diffusers keeps some small ones in float32 anyway.
    """
    found = transformer_class(folder, component)
    check_packed(Path(folder) / component)
    model = found.from_pretrained(Path(folder) / component, dtype=dtype, local_files_only=True, use_safetensors=True)
    return model.eval() if device is None else model.eval().to(device)


def transformer_class(folder: str | Path, component: str = "transformer") -> Any:
    """The diffusers class that the transformer's config.json names. Raises ValueError if diffusers does not have it."""
    import diffusers

    path = Path(folder) / component / "config.json"
    name = str(read_json(path).get("_class_name"))
    found = getattr(diffusers, name, None)
    if found is None:
        raise ValueError(f"{path}: diffusers has no model {name!r:.100}")
    return found


def load_component(folder: str | Path, name: str) -> Any:
    """One component of a pipeline folder, such as its tokenizer, by the class that model_index.json names."""
    library, class_name = read_json(Path(folder) / "model_index.json")[name]
    component: Any = getattr(importlib.import_module(library), class_name)
    return component.from_pretrained(Path(folder) / name, local_files_only=True, use_safetensors=True)
