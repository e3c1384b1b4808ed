"""Whether a pipeline folder can be loaded, found out from its small files and the headers of the large ones.

Stage fetch asks before it copies gigabytes; what it accepts, every later stage can load.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from qvgen.checkpoint.pipeline import load_component
from qvgen.models.files import SourceError, read_json, shards_of
from qvgen.models.source import Pipeline

_FILES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}  # what each one reads
_NAMED = 3  # tensors that a message names


def check_loadable(pipeline: Pipeline) -> None:
    """Raises SourceError if a component cannot be loaded in full precision, naming it and why.

    Scheduler and tokenizer are loaded. A model is built from its config without memory (meta device), and names and shapes
    of its parameters are compared with the headers of its weight files.
    """
    index = read_json(pipeline.folder / "model_index.json")
    for name in pipeline.components:
        if (pipeline.folder / name / "config.json").is_file():
            _check_model(pipeline.folder / name, *index[name])
            continue
        try:
            load_component(pipeline.folder, name)
        except Exception as error:  # diffusers and transformers raise all kinds
            raise SourceError(f"{pipeline.folder / name} cannot be loaded ({first_line(error)}); get it again") from None


def _check_model(folder: Path, library: str, class_name: str) -> None:
    config = read_json(folder / "config.json")
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "an unknown method")
        ours = method == "qvgen"
        raise SourceError(
            f"{folder} is already quantized by {'this project' if ours else method}: training starts from full precision; "
            "give the model it was made from"
        )
    found = _shapes(folder, _FILES[library])
    _check_sizes(folder / "config.json", config, found)
    try:
        model = _empty_model(library, class_name, config)
    except Exception as error:
        raise SourceError(f"{folder / 'config.json'} does not describe a {class_name!s:.100} ({first_line(error)})") from None
    optional = {*(getattr(model, "_tied_weights_keys", None) or ())}
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = sorted(name for name in expected if name not in found and name not in optional)
    if missing:
        raise SourceError(
            f"{folder} lacks {len(missing)} tensors of a {class_name} ({', '.join(missing[:_NAMED])}): its files are of "
            "another model, or incomplete; get them again"
        )
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    known = {*expected, *optional, *(name for name, _ in model.named_buffers())}
    if left := sorted(n for n in found if n not in known and not any(re.search(pattern, n) for pattern in ignored)):
        raise SourceError(
            f"{folder} holds {len(left)} tensors that a {class_name} with this config.json has no place for "
            f"({', '.join(left[:_NAMED])}): they would be dropped; get both again"
        )
    for name, shape in expected.items():
        if name in found and found[name] != shape:
            raise SourceError(f"{folder}: {name} has shape {found[name]}, its config.json makes {shape} of it; get both again")


def _empty_model(library: str, class_name: str, config: dict[str, Any]) -> torch.nn.Module:
    model_class = getattr(importlib.import_module(library), class_name)
    with torch.device("meta"):
        if library == "diffusers":
            return model_class.from_config(config)
        return model_class(model_class.config_class.from_dict(config))


def _shapes(folder: Path, filename: str) -> dict[str, list[int]]:
    """Shapes by tensor name, of the files that loading reads: one, or those of an index."""
    index = folder / f"{filename}.index.json"
    if (folder / filename).is_file():
        files = [folder / filename]
    elif index.is_file():
        files = [folder / name for name in shards_of(index)]
    else:
        present = sorted(path.name for path in folder.glob("*.safetensors"))
        stem = filename.removesuffix(".safetensors")
        variants = sorted({name[len(stem) + 1 :].split(".")[0] for name in present if name.startswith(f"{stem}.")})
        why = f"only the variant {', '.join(variants)}" if variants else f"only {', '.join(present)}"
        raise SourceError(
            f"{folder} has no {filename}, {why}: load the pipeline with variant=... in diffusers and write it with "
            "save_pretrained(folder)"
        )
    shapes = {}
    for file in files:
        header = json.loads(_header(file))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return shapes


def _header(path: Path) -> bytes:
    """The JSON at the start of a file that `check_safetensors` has accepted."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def check_sizes(folder: Path, config: dict[str, Any], library: str = "diffusers") -> None:
    """Raises SourceError if config.json of a component holds a size that its weights cannot have; only headers are read."""
    _check_sizes(folder / "config.json", config, _shapes(folder, _FILES[library]))


def _check_sizes(path: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    """Refuse sizes that the weights cannot have before a model is built by them: building takes time by the layer."""
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    for name, value in config.items():
        per_layer = "layers" in name or "blocks" in name
        limit = max(len(shapes), 2**8) if per_layer else max(elements, 2**16)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and number > limit:
                raise SourceError(
                    f"{path}: {name} = {number}, but the weights beside it are {len(shapes)} tensors of {elements} numbers in "
                    "all; get both again"
                )


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"
