"""Full-precision pipeline folders put together from what people have: a transformer in a single file, LoRA files.

Both take a folder as their base and write another, which `fetch.source` or `qvgen pack` reads. Conversion and fusing are
diffusers' own.
"""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qvgen.checkpoint.declared import empty_model, first_line, weight_files
from qvgen.checkpoint.new_folder import new_folder
from qvgen.checkpoint.packed import copy_all_but_transformer
from qvgen.checkpoint.pipeline import load_parts, transformer_class
from qvgen.models.files import SourceError, check_safetensors, read_json
from qvgen.models.generic import denoisers
from qvgen.models.hashes import hash_files
from qvgen.tensors import save_tensors

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors calls them
_CARD, _WEIGHTS = "README.md", "diffusion_pytorch_model.safetensors"
_SHOWN = 5  # names in a message


def import_single_file(base: Path, file: Path, out: Path) -> None:
    """Write `out`: the pipeline folder `base` with the transformer of `file`, in its publisher's key layout or diffusers'.

    Tensors have the dtype of most of the file's. `out` appears whole or not at all. Raises ValueError if it is there, and for
    a class that diffusers reads no single files of, a file of another model, and one that is quantized already.
    """
    _check_file(file)
    _check_base(base)
    found = transformer_class(base)
    if not hasattr(found, "from_single_file"):
        raise ValueError(f"diffusers has no reader of single files for {found.__name__}: give the model as a diffusers folder")
    dtype = _dtype(file)
    _check_fit(base, found, file)
    try:
        model = found.from_single_file(str(file), config=str(base), subfolder="transformer", local_files_only=True)
    except Exception as error:  # diffusers raises all kinds
        raise SourceError(f"{file} cannot be read as a {found.__name__} ({first_line(error)})") from None
    with _whole(base, out) as folder:
        _save(model, {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}, folder)
        _write_card(base, folder, [f"Its transformer is that of {_named(file)}."])


def fuse_adapters(base: Path, adapters: Sequence[tuple[Path, float]], out: Path) -> None:
    """Write `out`: the pipeline folder `base` with LoRA files fused into its transformer, each times its scale.

    The sums are made in float32 and stored as the base's tensors are. `out` appears whole or not at all. Raises ValueError if
    it is there, and for a file that does not fit this transformer.
    """
    for file, scale in adapters:
        _check_file(file)
        if not math.isfinite(scale):
            raise ValueError(f"the scale of {file} must be a finite number, found {scale}")
    _check_base(base)
    pipeline = load_parts(base, ("transformer",), "cpu")
    transformer = pipeline.transformer
    if not hasattr(pipeline, "load_lora_weights"):
        raise ValueError(f"{type(pipeline).__name__} takes no LoRA files in diffusers")
    for file, scale in adapters:
        try:
            _check_layers(pipeline, file)
            pipeline.load_lora_weights(str(file), local_files_only=True)
            fitting = any("lora_" in name for name, _ in transformer.named_parameters())
            pipeline.fuse_lora(components=["transformer"], lora_scale=scale, safe_fusing=True)
            pipeline.unload_lora_weights()
        except SourceError:
            raise
        except Exception as error:  # diffusers and peft raise all kinds
            raise SourceError(f"{file} does not fit {type(transformer).__name__} ({first_line(error)})") from None
        if not fitting:
            raise SourceError(f"{file} has nothing for {type(transformer).__name__}: it is of another model")
    stored = _stored_dtypes(weight_files(base / "transformer"))
    state = {name: tensor.to(stored.get(name, tensor.dtype)) for name, tensor in transformer.state_dict().items()}
    with _whole(base, out) as folder:
        _save(transformer, state, folder)
        _write_card(
            base, folder, [f"Fused into its transformer: {_named(file)}, scale {scale:g}." for file, scale in adapters]
        )


def _check_layers(pipeline: Any, file: Path) -> None:
    """Raises SourceError for adapters of layers that are not there, which diffusers drops with a warning."""
    named = pipeline.lora_state_dict(str(file), local_files_only=True)
    there = {f"transformer.{name}" for name, _ in pipeline.transformer.named_modules()}
    if left := sorted({name.partition(".lora")[0] for name in named if ".lora" in name} - there):
        raise SourceError(
            f"{file} also adapts {len(left)} layers ({', '.join(left[:_SHOWN])}) that {type(pipeline.transformer).__name__} "
            "does not have: it is of another model, or of text encoders too, which are not fused (docs/lora.md)"
        )


def parse_adapter(text: str) -> tuple[Path, float]:
    """FILE or FILE@SCALE. Raises ValueError for a scale that is no number."""
    path, at, scale = text.rpartition("@")
    if not at:
        return Path(text), 1.0
    try:
        return Path(path), float(scale)
    except ValueError:
        raise ValueError(f"--lora {text}: {scale!r} after the @ is no number; write FILE@0.8, or FILE alone for 1") from None


def _check_base(base: Path) -> None:
    if read_json(base / "transformer" / "config.json").get("quantization_config") is not None:
        raise SourceError(f"{base} is quantized already: give the full-precision pipeline")


def _check_file(file: Path) -> None:
    if file.suffix != ".safetensors":
        raise SourceError(f"{file}: only safetensors files are read; others can run code of whoever wrote them")
    if not file.is_file():
        raise SourceError(f"{file} does not exist")
    check_safetensors(file)


def _dtype(file: Path) -> torch.dtype:
    """That of most numbers. Raises SourceError for a file with tensors in another than _FLOATS."""
    from safetensors import safe_open

    count: Counter[str] = Counter()
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  not a dict
            part = tensors.get_slice(name)
            if part.get_dtype() not in _FLOATS:
                raise SourceError(
                    f"{file}: {name} is {part.get_dtype()}, so the file is quantized already; take the one in 16 or 32 bits"
                )
            count[part.get_dtype()] += math.prod(part.get_shape())
    if not count:
        raise SourceError(f"{file} holds no tensors")
    return _FLOATS[count.most_common(1)[0][0]]


def _stored_dtypes(files: Sequence[Path]) -> dict[str, torch.dtype]:
    from safetensors import safe_open

    found = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            found |= {name: _FLOATS.get(tensors.get_slice(name).get_dtype(), torch.float32) for name in names}
    return found


def _check_fit(base: Path, found: Any, file: Path) -> None:
    """Raises SourceError that lists tensors which are missing, left over or of another shape, before any is read: diffusers
    leaves a missing one empty and drops the others."""
    from diffusers.loaders import single_file_model
    from safetensors import safe_open

    config = read_json(base / "transformer" / "config.json")
    with safe_open(file, framework="pt") as tensors:
        names = list(tensors.keys())
        empty = {name: torch.empty(tensors.get_slice(name).get_shape(), device="meta") for name in names}
    model = empty_model("diffusers", found.__name__, config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if empty.keys() != expected.keys():
        known = str(single_file_model._get_single_file_loadable_mapping_class(found))
        convert = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[known]["checkpoint_mapping_fn"]
        empty = convert(checkpoint=empty, config=config)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    left = sorted(n for n in empty.keys() - expected.keys() if not any(re.search(pattern, n) for pattern in ignored))
    faults = []
    if missing := sorted(expected.keys() - empty.keys()):
        faults.append(f"lacks {_some(missing)}")
    if left:
        faults.append(f"has {_some(left)}, which this model has no place for")
    for name in sorted(expected.keys() & empty.keys()):
        if empty[name].shape != expected[name]:
            faults.append(f"{name} is {list(empty[name].shape)}, the model's {list(expected[name])}")
    if faults:
        raise SourceError(
            f"{file} does not fit the base's {found.__name__}: it {'; '.join(faults[:_SHOWN])}. --base must be a pipeline "
            "of the same sizes"
        )


@contextmanager
def _whole(base: Path, out: Path) -> Iterator[Path]:
    """A folder with all of `base` but its transformer, which becomes `out` when all is written."""
    with new_folder(out) as beside:
        copy_all_but_transformer(base, beside)
        for other in denoisers(base)[1:]:  # the other of two experts stays as it is
            shutil.copytree(base / other, beside / other, copy_function=shutil.copyfile)
        yield beside


def _save(model: Any, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    model.register_to_config(_name_or_path="")  # where it was loaded from on this machine
    (folder / "transformer").mkdir()
    model.save_config(folder / "transformer")
    save_tensors(folder / "transformer" / _WEIGHTS, state, metadata={"format": "pt"})


def _write_card(base: Path, folder: Path, told: Sequence[str]) -> None:
    index = read_json(base / "model_index.json")
    card = (base / _CARD).read_text(encoding="utf-8") if (base / _CARD).is_file() else f"# {index.get('_class_name')}\n"
    (folder / _CARD).write_text(f"{card.rstrip()}\n\n" + "\n".join(told) + "\n", encoding="utf-8")


def _named(file: Path) -> str:
    return f"{file.name} (sha256 {hash_files(file.parent, [file.name])[file.name].sha256})"


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} tensors ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
