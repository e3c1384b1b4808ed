"""`qvgen pack`: any diffusers pipeline, rounded to a packed folder, with LoRA files fused into it first."""

from __future__ import annotations

import tempfile
from pathlib import Path


def pack(
    base: str,
    out: Path,
    *,
    revision: str | None,
    lora: list[str],
    weight_bits: int,
    activation_bits: int,
    group_size: int | None,
    dtype: str,
) -> dict[str, int]:
    """Write a packed pipeline folder; return the packed layers of each transformer. Raises ValueError for bits that the format
    does not have, and as pack_pipeline and fuse_adapters do."""
    import torch

    from qvgen.checkpoint.assembled import fuse_adapters, parse_adapter
    from qvgen.checkpoint.new_folder import check_new
    from qvgen.checkpoint.rounded import pack_pipeline
    from qvgen.models.source import resolve_source
    from qvgen.quant.scheme import MAX_BITS, QuantArgs, QuantScheme

    if MAX_BITS < activation_bits < 16:
        raise ValueError(f"--activation-bits must be 2 to {MAX_BITS}, or 16 for inputs as they are; found {activation_bits}")
    scheme = QuantScheme(
        weights=QuantArgs(num_bits=weight_bits, strategy="group" if group_size else "channel", group_size=group_size),
        input_activations=None if activation_bits == 16 else QuantArgs(num_bits=activation_bits, strategy="token"),
        timestep_groups=1,
    )
    check_new(out)
    adapters, source = [parse_adapter(text) for text in lora], resolve_source(base, revision)
    if not adapters:
        return pack_pipeline(source, out, scheme, getattr(torch, dtype))
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as folder:
        fuse_adapters(source, adapters, Path(folder) / "fused")
        return pack_pipeline(Path(folder) / "fused", out, scheme, getattr(torch, dtype))
