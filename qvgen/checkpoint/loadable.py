"""Whether a pipeline folder can be loaded, found out from its small files and the headers of the large ones.

Stage fetch asks before it copies gigabytes; what it accepts, every later stage can load.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from qvgen.checkpoint.declared import check_packed, check_sizes, empty_model, first_line, shapes
from qvgen.checkpoint.pipeline import load_component
from qvgen.models.files import DENOISERS, SourceError, read_json
from qvgen.models.source import Pipeline
from qvgen.packing.config import METHOD

_NAMED = 3  # tensors that a message names
# Beginnings of names as older releases of transformers saved them, and what it makes of them: of CLIP, and of Qwen2.5-VL.
_RENAMED = (("vision_model.", ""), ("text_model.", ""), ("visual.", "model.visual."), ("model.", "model.language_model."))


def check_loadable(pipeline: Pipeline, expert: str | None = None) -> None:
    """Raises SourceError if a component cannot be loaded in full precision, naming it and why. Of two transformers the one
    that is not `expert` may be packed already.

    Scheduler and tokenizer are loaded. A model is built from its config without memory (meta device), and names and shapes
    of its parameters are compared with the headers of its weight files.
    """
    index = read_json(pipeline.folder / "model_index.json")
    for name in pipeline.components:
        if expert is not None and name in DENOISERS and name != expert and _is_packed(pipeline.folder / name):
            check_packed(pipeline.folder / name)
            continue
        if (pipeline.folder / name / "config.json").is_file():
            _check_model(pipeline.folder / name, *index[name])
            continue
        try:
            load_component(pipeline.folder, name)
        except Exception as error:  # diffusers and transformers raise all kinds
            raise SourceError(f"{pipeline.folder / name} cannot be loaded ({first_line(error)}); get it again") from None


def _is_packed(folder: Path) -> bool:
    found = read_json(folder / "config.json").get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == METHOD


def _check_model(folder: Path, library: str, class_name: str) -> None:
    config = read_json(folder / "config.json")
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "an unknown method")
        ours = method == "qvgen"
        raise SourceError(
            f"{folder} is already quantized by {'this project' if ours else method}: training starts from full precision; "
            "give the model it was made from"
        )
    found = shapes(folder, library)
    check_sizes(folder / "config.json", config, found)
    try:
        model = empty_model(library, class_name, config)
    except Exception as error:
        raise SourceError(f"{folder / 'config.json'} does not describe a {class_name!s:.100} ({first_line(error)})") from None
    optional = {*(getattr(model, "_tied_weights_keys", None) or ())}
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if library == "transformers":
        found = {_renamed(name, expected): shape for name, shape in found.items()}
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


def _renamed(name: str, expected: Collection[str]) -> str:
    """The name in `expected` of a tensor in a file, or its own."""
    others = (new + name.removeprefix(old) for old, new in _RENAMED if name.startswith(old))
    return next((known for known in (name, *others) if known in expected), name)
