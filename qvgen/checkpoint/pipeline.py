"""Loading from a diffusers pipeline folder, packed or not: a whole pipeline, or its transformer alone.

Every model file of the project is read here, by one rule: local files, safetensors only, so that nothing is downloaded and
nothing unpickled. safetensors are memory-mapped: a weight takes memory once.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

import qvgen.integrations.diffusers  # noqa: F401  (lets diffusers load packed transformers)
from qvgen.checkpoint.declared import check_packed
from qvgen.models.files import read_json


def load_pipeline(folder: str | Path, dtype: torch.dtype | dict[str, torch.dtype] | None = None) -> Any:
    """The diffusers pipeline of a folder, on the CPU in evaluation mode.

    `dtype`: of the parameters, packed layers excepted, or one per component ("default": of the rest); None: float32, a text
    encoder as it is stored. Raises ValueError if config.json of a packed transformer does not describe what is beside it.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    if (Path(folder) / "transformer" / "config.json").is_file():
        check_packed(Path(folder) / "transformer")
    diffusers_logging.disable_progress_bar()  # bars for files that load in milliseconds
    transformers_logging.disable_progress_bar()
    pipeline = DiffusionPipeline.from_pretrained(Path(folder), dtype=dtype, local_files_only=True, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_transformer(folder: str | Path, dtype: torch.dtype | None = None) -> Any:
    """The transformer of a pipeline folder, on the CPU in evaluation mode; no other component is read.

    `dtype`: of the parameters, packed layers excepted; None: float32. diffusers keeps some small ones in float32 anyway.
    """
    found = transformer_class(folder)
    check_packed(Path(folder) / "transformer")
    return found.from_pretrained(Path(folder) / "transformer", dtype=dtype, local_files_only=True, use_safetensors=True).eval()


def transformer_class(folder: str | Path) -> Any:
    """The diffusers class that transformer/config.json names. Raises ValueError if diffusers does not have it."""
    import diffusers

    path = Path(folder) / "transformer" / "config.json"
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
