"""`qvgen import`: models in other people's formats, as folders that the project reads."""

from __future__ import annotations

from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")


def import_public_qvgen(
    base: str,
    checkpoint: Path,
    out: Path,
    *,
    revision: str | None = None,
    clips: str = "as-trained",
    steps: int = 50,
    weight_bits: int = 4,
    activation_bits: int = 4,
    dtype: str = "bfloat16",
) -> int:
    """Write a packed pipeline folder from a checkpoint of the public QVGen code; return the number of packed layers.

    `base`: folder or hub id (with `revision`, or as ORG/NAME@COMMIT) of the full-precision pipeline, for everything but the
    transformer's tensors.
    `clips` and `steps`: see slots_by_timestep. `dtype`: of the tensors that are not packed. `out` appears whole or not at all.
    Raises ValueError for a checkpoint that does not fit, and if `out` is there already.
    """
    import torch

    from qvgen.checkpoint.new_folder import check_new, new_folder
    from qvgen.checkpoint.packed import export_pipeline, verify_folder
    from qvgen.checkpoint.pipeline import load_component, load_transformer
    from qvgen.checkpoint.public_qvgen import pack_public_, public_scheme, read_checkpoint, slots_by_timestep
    from qvgen.models.source import read_pipeline

    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, found {dtype}")
    check_new(out)
    tensors = read_checkpoint(checkpoint)
    source = _full_precision(base, revision)
    read_pipeline(source)
    scheduler = load_component(source, "scheduler") if clips == "inference-script" else None
    slots = slots_by_timestep(clips, scheduler, steps)  # type: ignore[arg-type]
    scheme = public_scheme([], weight_bits, activation_bits, groups=len(slots) or 1)
    transformer = load_transformer(source)
    names = pack_public_(transformer, tensors, scheme, slots)
    scheme = scheme.model_copy(update={"targets": tuple(names)})
    with new_folder(out) as beside:
        method = f"QVGen (public code and checkpoint; clips {clips})"
        export_pipeline(source, transformer, scheme, beside, getattr(torch, dtype), method=method)
        count = verify_folder(beside)
    return count


def _full_precision(base: str, revision: str | None) -> Path:
    """The folder of a base. Raises ValueError for a model of the registry: those are packed."""
    from qvgen.hub.reference import is_registered, parse_hub_id
    from qvgen.models.source import resolve_source

    if is_registered(base):
        raise ValueError(
            f"--base {base:.200}: models of the registry are packed, and the checkpoint is to be read into the full-precision "
            "transformer that it was trained from: give its folder, or ORG/NAME@COMMIT"
        )
    if not Path(base).is_dir() and (hub := parse_hub_id(base)) is not None:
        if revision not in (None, hub.commit):
            raise ValueError(f"--base {base:.200} names another commit than --revision {revision:.60}: give one of them")
        base, revision = hub.repository, hub.commit
    return resolve_source(base, revision)
