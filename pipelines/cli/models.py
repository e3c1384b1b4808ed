"""Commands that change the form of a model: from other people's formats, and back."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

models = typer.Typer()


class Format(StrEnum):
    QVGEN_PUBLIC = "qvgen-public"


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
    """A checkpoint of the public QVGen code as a packed folder, which loads and runs like our own."""
    from pipelines.commands.import_model import import_public_qvgen

    assert form is Format.QVGEN_PUBLIC
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
    from qvgen.packing.record import is_asked_for
    from qvgen.packing.record import verify as verify_files

    folder = model_folder(model)
    layers = verify_folder(folder)
    asked = is_asked_for()
    count = verify_files(weight_files(folder / "transformer")) if asked else 0
    known = f"{count} tensors and config.json as they were written" if count else "its files record no hashes to compare"
    print(f"{folder}: {layers} packed layers, {known if asked else 'hashes not compared: QVGEN_VERIFY=0'}")


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
