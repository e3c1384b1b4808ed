"""A packed folder of any diffusers pipeline by plain rounding: no data, no training, whole ranges.

Every transformer of the pipeline is packed, those of families that the stages do not train too (models/generic.py).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from qvgen.checkpoint.declared import weight_files
from qvgen.checkpoint.new_folder import check_new, new_folder
from qvgen.checkpoint.packed import export_pipeline, write_transformer
from qvgen.checkpoint.pipeline import load_component
from qvgen.models.files import SourceError, check_safetensors, read_json
from qvgen.models.generic import block_linears, denoisers
from qvgen.nn.swap import convert_, prepare_
from qvgen.quant.scheme import QuantScheme


def pack_pipeline(base: str | Path, out: str | Path, scheme: QuantScheme, dtype: torch.dtype) -> dict[str, int]:
    """Write `out`, a packed pipeline, of the full-precision pipeline folder `base`; return the packed layers of each
    transformer.

    Empty `targets` of the scheme mean every linear layer of the blocks. `dtype`: of tensors that are not packed. `out` appears
    whole or not at all. Raises ValueError if it is there, for a folder without transformers, and one that is quantized.
    """
    base, out = Path(base), Path(out)
    check_new(out)
    names = denoisers(base)
    for name in names:
        if read_json(base / name / "config.json").get("quantization_config") is not None:
            raise SourceError(f"{base / name} is quantized already: give the full-precision pipeline")
        for file in weight_files(base / name):
            check_safetensors(file)
    counts = {}
    with new_folder(out) as beside:
        for name in names:
            model = load_component(base, name).eval()
            targets = prepare_(model, scheme, default_targets=block_linears(model))
            convert_(model)
            if not counts:
                export_pipeline(base, model, scheme, beside, dtype, method="rounding to nearest", component=name)
            else:
                shutil.rmtree(beside / name)  # the full-precision one
                write_transformer(model, scheme, targets, beside / name, dtype)
            counts[name] = len(targets)
    return counts
