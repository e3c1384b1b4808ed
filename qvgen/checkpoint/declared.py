"""What config.json declares, against the weight files beside it: asked before a model is built and memory is taken.

Only config.json and the headers of the files are read.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

from qvgen.models.files import SourceError, check_safetensors, read_json, shards_of
from qvgen.packing.config import METHOD, from_config
from qvgen.packing.record import is_asked_for, verify_fields

_FILES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}  # what each one reads


def check_packed(folder: Path) -> None:
    """Raises ValueError if config.json of a packed transformer is not the one its files record, holds sizes that they cannot
    have, or describes no model; does nothing for a transformer that is not packed."""
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    if not isinstance(quantization, dict) or not isinstance(quantization.get("quant_method"), str):
        raise SourceError(f"{folder / 'config.json'}: quantization_config must be an object with a quant_method")
    if quantization["quant_method"] != METHOD:
        return
    packed = {f"{name}.weight" for name in from_config(quantization)[0].targets}
    files = weight_files(folder)
    for file in files:
        if not file.is_file():
            raise SourceError(f"{file} does not exist, but the index beside it names it; get the folder again")
        check_safetensors(file)
    if is_asked_for():
        verify_fields(files)
    found = shapes(folder, "diffusers")
    check_sizes(folder / "config.json", config, found)
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    try:
        expected = empty_model("diffusers", str(config.get("_class_name")), plain).state_dict()
    except Exception as error:  # diffusers raises all kinds for a config.json that describes no model
        raise ValueError(f"{folder / 'config.json'} does not describe what is beside it ({first_line(error)})") from None
    # Now, because diffusers makes tables of positions of these sizes before it looks at the files.
    for name, tensor in expected.items():
        if name in packed:
            continue  # not in the files; if it is, loading says that it has no place
        if found.get(name, list(tensor.shape)) != list(tensor.shape):
            raise SourceError(
                f"{folder}: {name} has shape {found[name]}, its config.json makes {list(tensor.shape)} of it; get both again"
            )


def empty_model(library: str, class_name: str, config: dict[str, Any]) -> torch.nn.Module:
    model_class = getattr(importlib.import_module(library), class_name)
    with torch.device("meta"):
        if library == "diffusers":
            return model_class.from_config(config)
        return model_class(model_class.config_class.from_dict(config))


def shapes(folder: Path, library: str) -> dict[str, list[int]]:
    """Shapes by tensor name, of the files that loading reads."""
    found = {}
    for file in weight_files(folder, library):
        header = json.loads(_header(file))
        found |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return found


def weight_files(folder: Path, library: str = "diffusers") -> list[Path]:
    """The files that loading reads: one, or those of an index. Where a folder has both, diffusers takes the index and
    transformers the one file. Raises SourceError if there are neither."""
    filename = _FILES[library]
    index, single = folder / f"{filename}.index.json", folder / filename
    if index.is_file() and (library == "diffusers" or not single.is_file()):
        return [folder / name for name in shards_of(index)]
    if single.is_file():
        return [single]
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    stem = filename.removesuffix(".safetensors")
    variants = sorted({name[len(stem) + 1 :].split(".")[0] for name in present if name.startswith(f"{stem}.")})
    why = f"only the variant {', '.join(variants)}" if variants else f"only {', '.join(present)}"
    raise SourceError(
        f"{folder} has no {filename}, {why}: load the pipeline with variant=... in diffusers and write it with "
        "save_pretrained(folder)"
    )


def _header(path: Path) -> bytes:
    """The JSON at the start of a file that `check_safetensors` has accepted."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def check_sizes(path: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> None:
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
