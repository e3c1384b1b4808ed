"""Loading from a diffusers pipeline folder, packed or not: a whole pipeline, or its transformer alone.

Every model file of the project is read here, by one rule: local files, safetensors only, so that nothing is downloaded and
nothing unpickled. safetensors are memory-mapped: a weight takes memory once.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

import qvgen.integrations.diffusers  # noqa: F401  (lets diffusers load packed transformers)
from qvgen.checkpoint.declared import check_packed
from qvgen.models.files import read_json
from qvgen.models.generic import DENOISERS

PARTS = ("text_encoder", "vae", "transformer")  # what a pipeline has of models: the rest is small


def load_pipeline(
    folder: str | Path,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """The diffusers pipeline of a folder in evaluation mode, on `device` (None: the CPU).

    `dtype`: of the parameters, packed layers excepted, or one per component ("default": of the rest); None: float32, a text
    encoder as it is stored. Raises ValueError if config.json of a packed transformer does not describe what is beside it.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for component in DENOISERS:
        if (Path(folder) / component / "config.json").is_file():
            check_packed(Path(folder) / component)
    diffusers_logging.disable_progress_bar()  # bars for files that load in milliseconds
    transformers_logging.disable_progress_bar()
    pipeline = DiffusionPipeline.from_pretrained(Path(folder), dtype=dtype, local_files_only=True, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline if device is None else pipeline.to(device)


def load_parts(folder: str | Path, parts: Collection[str], device: torch.device | str) -> Any:
    """The pipeline of a folder with some of its models, `parts` of PARTS, on `device`, a text encoder as it is stored, the
    VAE in float32. The others are None; a transformer that is not read is there without its weights (on the meta device),
    because pipelines read its config."""
    import diffusers

    index, components = read_json(Path(folder) / "model_index.json"), {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if not isinstance(value, list):  # a setting of the pipeline
            components[name] = value
        elif value[0] is None or (name in PARTS and name not in parts):
            components[name] = None
        else:
            components[name] = load_component(folder, name)
        if name in parts:
            components[name] = components[name].eval().to(device)
    if "transformer" not in parts:
        with torch.device("meta"):
            components["transformer"] = _without_weights(folder)
    return getattr(diffusers, index["_class_name"])(**components)


def _without_weights(folder: str | Path) -> Any:
    found = transformer_class(folder)
    config = {k: v for k, v in read_json(Path(folder) / "transformer" / "config.json").items() if k != "quantization_config"}
    return found.from_config(config).eval()


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
