"""The way back out of the packed format: a plain diffusers folder of a packed one.

Its transformer has the weights that the packed layers compute with, at their full size, in `dtype`; every other component is
the packed folder's, byte for byte. Activations are no longer quantized, so its videos are not those of the packed model.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData

from qvgen.checkpoint.new_folder import new_folder
from qvgen.checkpoint.packed import copy_all_but_transformer, load_packed_transformer, packed_denoisers
from qvgen.models.generic import denoisers
from qvgen.nn.packed_linear import packed_layers

_CARD = "README.md"
_FACTS = ("license", "license_name", "license_link", "base_model", "library_name", "pipeline_tag")


def unpack_folder(source: str | Path, out: str | Path, dtype: torch.dtype) -> int:
    """Write `out`, a pipeline in full precision, of the packed pipeline `source`; return the number of layers unpacked.

    Modules that diffusers keeps in float32 stay so. `out` appears whole or not at all. Raises ValueError if it is there
    already, for a source that is not packed or damaged, and with the layer's name for a weight that `dtype` cannot hold.
    """
    source, out = Path(source), Path(out)
    count, scheme = 0, ""
    with new_folder(out) as beside:
        copy_all_but_transformer(source, beside)
        packed = packed_denoisers(source)
        for name in denoisers(source):
            if name not in packed:  # the second of two experts, before its turn
                shutil.copytree(source / name, beside / name, copy_function=shutil.copyfile)
                continue
            transformer = load_packed_transformer(source, dtype, name)
            count += len(list(packed_layers(transformer)))
            scheme = transformer.hf_quantizer.quantization_config.scheme.name
            transformer.dequantize()
            transformer.register_to_config(_name_or_path="")  # where it was loaded from on this machine
            transformer.save_pretrained(beside / name)
        (beside / _CARD).write_text(_model_card(source, scheme, dtype), encoding="utf-8")
        for file in beside.rglob("*.safetensors"):  # safetensors writes files that only their owner reads
            file.chmod((beside / _CARD).stat().st_mode)
    return count


def _model_card(source: Path, scheme: str, dtype: torch.dtype) -> str:
    given = ModelCard.load(source / _CARD, ignore_metadata_errors=True) if (source / _CARD).is_file() else None
    facts = {} if given is None else {name: given.data.get(name) for name in _FACTS}
    data = ModelCardData(**facts, tags=["qvgen", "unpacked"])  # type: ignore[arg-type]
    base = facts.get("base_model") or "the packed model's base"
    stored = str(dtype).removeprefix("torch.")
    return f"""---
{data.to_yaml()}
---

# Unpacked from {scheme}

Base model: {base}. The linear layers of its transformer have the values of a {scheme} model
in {stored}; their inputs are no longer quantized. `qvgen unpack` made it of a packed folder; every other component is
unchanged.
"""
