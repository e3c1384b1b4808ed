"""Bytes of a transformer: of its files as they are, and of the packed format for a model that is not here."""

from __future__ import annotations

from pathlib import Path

import torch

from qvgen.checkpoint.pipeline import load_transformer
from qvgen.models.family import Family
from qvgen.nn.targets import match_linears
from qvgen.packing.layout import packed_bytes
from qvgen.quant.scheme import QuantScheme


def folder_bytes(folder: str | Path) -> int:
    """Bytes of every file below `folder`: weights, headers and config."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def write_variant(pipeline: str | Path, target: str | Path, dtype: str, component: str = "transformer") -> None:
    """The pipeline folder `target`: `pipeline` with every parameter of its transformer, of two of `component`, in `dtype`
    ("bfloat16", ...).

    Only this transformer is written, the rest are links to `pipeline`.
    """
    pipeline, target = Path(pipeline).resolve(), Path(target)
    target.mkdir(parents=True)
    for entry in pipeline.iterdir():
        if entry.name != component:
            (target / entry.name).symlink_to(entry)
    transformer = load_transformer(pipeline, getattr(torch, dtype), component=component)
    for parameter in transformer.parameters():  # diffusers keeps some in float32 when it loads bfloat16
        parameter.data = parameter.data.to(getattr(torch, dtype))
    transformer.save_pretrained(target / component)


def published_packed_ratio(family: Family, scheme: QuantScheme) -> float:
    """Bytes of the family's published model packed with `scheme` over its bytes in bfloat16, counted on the meta device.

    What is not packed stays bfloat16. File headers, below a ten-thousandth here, are left out on both sides. Raises
    ValueError if the scheme names layers that the model does not have.
    """
    with torch.device("meta"):
        model = family.transformer(family.published[1])
    whole = sum(parameter.numel() for parameter in model.parameters())
    packed = replaced = 0
    for name in match_linears(model, scheme.targets, scheme.ignore, family.default_targets):
        linear = model.get_submodule(name)
        assert isinstance(linear, torch.nn.Linear)
        replaced += sum(parameter.numel() for parameter in linear.parameters())
        packed += packed_bytes(linear.in_features, linear.out_features, scheme, linear.bias is not None)
    return (packed + 2 * (whole - replaced)) / (2 * whole)
