"""Commands that change the form of a model: from other people's formats, and back."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

models = typer.Typer()


class Format(StrEnum):
    QVGEN_PUBLIC = "qvgen-public"
    SINGLE_FILE = "diffusers-single-file"


class Clips(StrEnum):
    AS_TRAINED = "as-trained"
    MEAN = "mean"
    INFERENCE_SCRIPT = "inference-script"


class DType(StrEnum):
    BFLOAT16 = "bfloat16"
    BF16 = "bf16"
    FLOAT16 = "float16"
    FP16 = "fp16"
    FLOAT32 = "float32"
    FP32 = "fp32"

    @property
    def full(self) -> str:
        """PyTorch's name of it."""
        return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(self, str(self))


@models.command(name="import")
def import_model(
    checkpoint: Annotated[Path, typer.Option(help="A safetensors file")],
    base: Annotated[str, typer.Option(help="The full-precision pipeline: a diffusers folder, or ORG/NAME@COMMIT")],
    out: Annotated[Path, typer.Option(help="Folder to write")],
    form: Annotated[Format, typer.Option("--format", help="Of the checkpoint")] = Format.QVGEN_PUBLIC,
    revision: Annotated[str | None, typer.Option(help="Commit of a hub id that names none")] = None,
    clips: Annotated[Clips, typer.Option(help="Which clips a timestep gets: docs/import.md")] = Clips.AS_TRAINED,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps that inference-script counts by")] = 50,
    weight_bits: Annotated[int, typer.Option(min=2, max=8)] = 4,
    activation_bits: Annotated[int, typer.Option(min=2, max=8)] = 4,
    dtype: Annotated[str, typer.Option(help="Of tensors that are not packed: bfloat16, float16, float32")] = "bfloat16",
) -> None:
    """Other people's files as folders: a checkpoint of the public QVGen code, packed; a transformer in one file, in full
    precision, with the rest of BASE, as a source for `fetch` or `qvgen pack`."""
    from pipelines.commands.import_model import import_public_qvgen

    if form is Format.SINGLE_FILE:
        from qvgen.checkpoint.assembled import import_single_file
        from qvgen.models.source import resolve_source

        import_single_file(resolve_source(base, revision), checkpoint, out)
        print(f"{out}: a full-precision pipeline with the transformer of {checkpoint}")
        return
    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    count = import_public_qvgen(base, checkpoint, out, revision=revision, clips=clips, steps=steps, dtype=dtype, **bits)
    print(f"{out}: {count} packed layers, W{weight_bits}A{activation_bits}")


@models.command()
def verify(
    model: Annotated[str, typer.Argument(help="A packed pipeline: artifacts/packed, or models:/qvgen@champion")],
) -> None:
    """Whether a packed folder is whole: every tensor and config.json as they were written, all layers consistent."""
    from qvgen.checkpoint.declared import weight_files
    from qvgen.checkpoint.packed import verify_folder
    from qvgen.hub.resolve import model_folder
    from qvgen.models.generic import denoisers
    from qvgen.packing.record import is_asked_for
    from qvgen.packing.record import verify as verify_files

    folder = model_folder(model)
    layers = verify_folder(folder)
    asked = is_asked_for()
    count = sum(verify_files(weight_files(folder / name)) for name in denoisers(folder)) if asked else 0
    known = f"{count} tensors and config.json as they were written" if count else "its files record no hashes to compare"
    print(f"{folder}: {layers} packed layers, {known if asked else 'hashes not compared: QVGEN_VERIFY=0'}")


@models.command()
def fuse(
    base: Annotated[str, typer.Argument(help="The full-precision pipeline: a diffusers folder, or a hub id with --revision")],
    lora: Annotated[list[str], typer.Option(help="FILE@SCALE, or FILE; several are fused one after the other")],
    out: Annotated[Path, typer.Option(help="Folder to write")],
    revision: Annotated[str | None, typer.Option(help="Commit of a hub id")] = None,
) -> None:
    """A full-precision folder with LoRA files fused into its transformer: the way to have them in packed weights."""
    from qvgen.checkpoint.assembled import fuse_adapters, parse_adapter
    from qvgen.models.source import resolve_source

    adapters = [parse_adapter(text) for text in lora]
    fuse_adapters(resolve_source(base, revision), adapters, out)
    print(f"{out}: {len(adapters)} LoRA files fused")


@models.command()
def pack(
    base: Annotated[str, typer.Argument(help="The full-precision pipeline: a diffusers folder, or a hub id with --revision")],
    out: Annotated[Path, typer.Option(help="Folder to write")],
    revision: Annotated[str | None, typer.Option(help="Commit of a hub id")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="FILE@SCALE, fused before packing; may be given several times")
    ] = None,
    weight_bits: Annotated[int, typer.Option(min=2, max=8)] = 4,
    activation_bits: Annotated[int, typer.Option(min=2, max=16, help="16: not quantized; else at most 8")] = 8,
    group_size: Annotated[int | None, typer.Option(min=2, help="Weights that share a scale [default: a whole row]")] = None,
    dtype: Annotated[DType, typer.Option(help="Of tensors that are not packed")] = DType.BFLOAT16,
) -> None:
    """Round any diffusers pipeline to a packed folder, without data or training. `qvgen repro` trains instead."""
    from pipelines.commands.pack import pack as run

    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits, "group_size": group_size}
    counts = run(base, out, revision=revision, lora=lora or [], dtype=dtype.full, **bits)
    print(f"{out}: " + ", ".join(f"{count} packed layers in {name}" for name, count in counts.items()))


@models.command()
def unpack(
    model: Annotated[str, typer.Argument(help="A packed pipeline: artifacts/packed, or models:/qvgen@champion")],
    out: Annotated[Path, typer.Option(help="Folder to write")],
    dtype: Annotated[DType, typer.Option(help="Of the weights")] = DType.BFLOAT16,
) -> None:
    """A packed folder as a plain diffusers folder again, with the quantized weights in full size: docs/import.md."""
    import torch

    from qvgen.checkpoint.unpack import unpack_folder
    from qvgen.hub.resolve import model_folder

    count = unpack_folder(model_folder(model), out, getattr(torch, dtype.full))
    print(f"{out}: {count} layers unpacked to {dtype.full}")


@models.command()
def push(
    model: Annotated[str, typer.Argument(help="A packed pipeline: artifacts/packed, or models:/qvgen@champion")],
    repository: Annotated[str, typer.Argument(help="ORG/NAME on Hugging Face")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be created and sent, and stop")] = False,
    private: Annotated[bool, typer.Option("--private", help="If the repository is created, only its owners see it")] = False,
) -> None:
    """Send a packed folder that proves whole to Hugging Face."""
    from pipelines.commands.push import measured_in_project
    from qvgen.hub.push import plan
    from qvgen.hub.push import push as run
    from qvgen.hub.resolve import model_folder

    folder = model_folder(model)
    planned = plan(folder, repository, measured_in_project(folder))
    print(planned)
    print("nothing was sent: --dry-run" if dry_run else run(planned, private=private))
