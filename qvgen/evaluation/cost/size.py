"""Bytes of a transformer: of its files as they are, and of the packed format for a model that is not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qvgen.nn.targets import match_linears
from qvgen.packing.layout import packed_bytes
from qvgen.quant.scheme import QuantScheme

# transformer/config.json of Wan 2.1 T2V 1.3B in diffusers format.
WAN_2_1_1_3B: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}


def folder_bytes(folder: str | Path) -> int:
    """Bytes of every file below `folder`: weights, headers and config."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def write_variant(pipeline: str | Path, target: str | Path, dtype: str) -> None:
    """The pipeline folder `target`: `pipeline` with every parameter of its transformer in `dtype` ("bfloat16", ...).

    Only the transformer is written, the rest are links to `pipeline`.
    """
    import diffusers

    pipeline, target = Path(pipeline).resolve(), Path(target)
    target.mkdir(parents=True)
    for entry in pipeline.iterdir():
        if entry.name != "transformer":
            (target / entry.name).symlink_to(entry)
    source = pipeline / "transformer"
    transformer: Any = diffusers.AutoModel.from_pretrained(str(source), dtype=getattr(torch, dtype), local_files_only=True)
    for parameter in transformer.parameters():  # diffusers keeps some in float32 when it loads bfloat16
        parameter.data = parameter.data.to(getattr(torch, dtype))
    transformer.save_pretrained(target / "transformer")


def wan_packed_ratio(scheme: QuantScheme, default_targets: tuple[str, ...]) -> float:
    """Bytes of Wan 2.1 1.3B packed with `scheme` over its bytes in bfloat16, counted on the meta device.

    What is not packed stays bfloat16. File headers, below a ten-thousandth here, are left out on both sides.
    """
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(**WAN_2_1_1_3B)
    whole = sum(parameter.numel() for parameter in model.parameters())
    packed = replaced = 0
    for name in match_linears(model, scheme.targets, scheme.ignore, default_targets):
        linear = model.get_submodule(name)
        assert isinstance(linear, torch.nn.Linear)
        replaced += sum(parameter.numel() for parameter in linear.parameters())
        packed += packed_bytes(linear.in_features, linear.out_features, scheme, linear.bias is not None)
    return (packed + 2 * (whole - replaced)) / (2 * whole)
