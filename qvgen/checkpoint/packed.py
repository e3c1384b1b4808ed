"""Packed pipelines on disk: writing them from a converted transformer, loading and verifying them.

A packed pipeline is a diffusers folder whose transformer holds packed layers (packing/layout.py) and whose
transformer/config.json says so under `quantization_config`. Everything else is the source pipeline's, byte for byte.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import ModelCard, ModelCardData, split_torch_state_dict_into_shards
from torch import nn

from qvgen.checkpoint.declared import first_line
from qvgen.checkpoint.pipeline import load_transformer
from qvgen.models.files import DENOISERS, GENERATION, MANIFEST, SourceError, check_safetensors, read_json
from qvgen.models.generic import denoisers
from qvgen.models.registry import families
from qvgen.nn.packed_linear import PackedLinear, packed_layers
from qvgen.nn.timestep import largest_timestep
from qvgen.packing.config import to_config
from qvgen.packing.layout import EXACT_NAMES
from qvgen.packing.record import record
from qvgen.quant.scheme import EXTRAS, QuantScheme
from qvgen.tensors import save_tensors

_TRANSFORMER, _CARD = "transformer", "README.md"
_MAX_SHARD_SIZE = "10GB"  # diffusers' own


def export_pipeline(
    source_folder: str | Path,
    transformer: nn.Module,
    scheme: QuantScheme,
    out_folder: str | Path,
    dtype: torch.dtype,
    method: str = "qvgen",
    guidance_stop: float = 1.0,
    component: str = _TRANSFORMER,
) -> None:
    """Write a packed pipeline to `out_folder`, which must be empty or absent.

    `transformer` is the converted model of the pipeline in `source_folder`, of two that of `component`, and the other one is
    copied. Its tensors outside the packed layers, and the
    biases and low-rank factors of these, are stored in `dtype`; packed tensors as they are. config.json names every packed
    layer, so that loading matches no patterns. The source's manifest stays behind: it records the hash of another
    transformer. A `guidance_stop` below 1 goes into generation.json and the model card. Same input, same bytes. Raises
    ValueError if the transformer has no packed layers or they have another scheme.
    """
    source, out = Path(source_folder), Path(out_folder)
    names = _packed_names(transformer, scheme)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; export to a new folder")
    out.mkdir(parents=True, exist_ok=True)
    copy_all_but_transformer(source, out)
    for other in DENOISERS:
        if other != component and (source / other).is_dir():
            shutil.copytree(source / other, out / other, copy_function=shutil.copyfile)
    write_transformer(transformer, scheme, names, out / component, dtype)
    if guidance_stop < 1:
        settings = read_json(out / GENERATION) if (out / GENERATION).is_file() else {}
        (out / GENERATION).write_text(json.dumps(settings | {"guidance_stop": guidance_stop}, indent=2) + "\n")
    (out / _CARD).write_text(_model_card(source, scheme, len(names), method, guidance_stop), encoding="utf-8")


def copy_all_but_transformer(source: Path, out: Path) -> None:
    """What a pipeline made of another takes over as it is: all but transformers, model card, manifest and hidden files."""
    for entry in sorted(source.iterdir()):
        if entry.name in (*DENOISERS, _CARD, MANIFEST) or entry.name.startswith("."):
            continue
        if entry.is_dir():
            shutil.copytree(entry, out / entry.name, copy_function=shutil.copyfile)  # new files: the umask's mode
        else:
            shutil.copyfile(entry, out / entry.name)


def load_packed_transformer(folder: str | Path, dtype: torch.dtype | None = None, component: str = _TRANSFORMER) -> Any:
    """The transformer of a packed pipeline, or one of its two, verified, on the CPU, in evaluation mode.

    Activations and the tensors outside the packed layers are in `dtype`, by default float32. Raises ValueError for a
    folder that is not a packed pipeline and for damaged, missing or inconsistent tensors, naming them.
    """
    transformer = Path(folder) / component
    _check_config(transformer)
    _check_files(transformer)
    try:
        return load_transformer(folder, dtype, component=component)
    except (ValueError, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # diffusers raises all kinds for files that are not what config.json says
        raise ValueError(f"{transformer / 'config.json'} does not describe what is beside it ({first_line(error)})") from None


def verify_folder(folder: str | Path) -> int:
    """Load and check everything in a packed pipeline's transformers, of two the one that is packed if the other is not yet,
    and return the number of packed layers.

    Raises ValueError, naming file or tensor, if a file is truncated, a tensor is missing, left over, of another shape or
    dtype, holds NaN or Inf, or if codes do not add up to their stored sums.
    """
    if not (Path(folder) / "model_index.json").is_file():
        raise ValueError(f"{folder} is not a diffusers pipeline: it has no model_index.json")
    count = 0
    for component in packed_denoisers(Path(folder)):
        transformer = load_packed_transformer(folder, component=component)
        for name, tensor in transformer.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{name}: holds NaN or Inf; the checkpoint is damaged, export it again")
        count += len(list(packed_layers(transformer)))
    return count


def packed_denoisers(folder: Path) -> list[str]:
    """The transformers of a pipeline folder that are quantized; all of them if none is, whose loading then says so."""
    found = denoisers(folder)
    paths = {name: folder / name / "config.json" for name in found}
    packed = [name for name in found if paths[name].is_file() and "quantization_config" in read_json(paths[name])]
    return packed or found


def _packed_names(transformer: nn.Module, scheme: QuantScheme) -> list[str]:
    layers = dict(packed_layers(transformer))
    if not layers:
        raise ValueError("the transformer has no packed layers: call convert_ first")
    what = ("weights", "input_activations", "timestep_groups", *EXTRAS)
    for name, layer in layers.items():
        if any(getattr(layer.scheme, field) != getattr(scheme, field) for field in what):
            raise ValueError(f"layer {name} was packed with another scheme ({layer.scheme.name}) than the one given")
    return list(layers)


def write_transformer(transformer: Any, scheme: QuantScheme, names: list[str], folder: Path, dtype: torch.dtype) -> None:
    """Write a converted transformer to a folder that is not there yet; `names`: of its packed layers."""
    folder.mkdir()
    config = json.loads(transformer.to_json_string())
    config.pop("_name_or_path", None)  # where it was loaded from on this machine
    resolved = scheme.model_copy(update={"targets": tuple(names), "ignore": ()})
    config["quantization_config"] = to_config(resolved, len(names), largest_timestep(transformer))
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    modules = dict(transformer.named_modules(remove_duplicate=False))  # a layer in two places is stored under both names
    state = {}
    for name, tensor in transformer.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        exact = leaf in EXACT_NAMES and isinstance(modules[owner], PackedLinear)
        cast = tensor.is_floating_point() and not exact
        state[name] = tensor.detach().to("cpu", dtype if cast else None).contiguous()
    stem, suffix = SAFETENSORS_WEIGHTS_NAME.split(".")
    split = split_torch_state_dict_into_shards(
        state, max_shard_size=_MAX_SHARD_SIZE, filename_pattern=stem + "{suffix}." + suffix
    )
    for filename, tensors in split.filename_to_tensors.items():
        shard = {name: state[name] for name in tensors}
        save_tensors(folder / filename, shard, metadata={"format": "pt", **record(shard, config)})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder.parent} is not a packed pipeline: it has no {folder.name}/config.json")
    config = read_json(path)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "qvgen":
        raise ValueError(f"{folder.parent} is not packed: {path.name} of its transformer has no qvgen quantization_config")


def _check_files(folder: Path) -> None:
    """Open every weight file, so that a truncated one is named before diffusers fails on it."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no safetensors files; other formats are not read")
    for file in files:
        try:
            check_safetensors(file)
        except SourceError as error:
            raise ValueError(f"{file} is truncated or damaged ({error}); export it again") from None


def _extra_rows(scheme: QuantScheme) -> str:
    """Rows of the card that say what a packed layer of this scheme costs besides its packed weight; empty for a plain one."""
    rows = {
        "input_scaling": "divided by a stored vector first, in a pass of their own",
        "input_rotation": f"rotated by Hadamard blocks of {scheme.input_rotation} first, in a pass of their own",
        "low_rank": f"also read by a 16-bit branch, of rank {scheme.low_rank}, at most 1/16 of the layer's smaller side",
    }
    return "".join(f"| and | {rows[name]} |\n" for name in scheme.extras)


def _snippet(pipeline_class: str, guidance_stop: float) -> str:
    """Python that samples the model as evaluation does."""
    image = 'image=image, prompt="a prompt"' if "Image" in pipeline_class else '"a prompt"'
    lines = ["import qvgen.integrations.diffusers", f"from diffusers import {pipeline_class}"]
    load = [f'pipeline = {pipeline_class}.from_pretrained("path/to/this/folder")']
    if guidance_stop < 1:
        lines.append("from qvgen.sampling import stop_guidance")
        load += [
            f"# Sampled and scored without guidance from cleanness {guidance_stop} on, which also takes half the time there.",
            f"video = pipeline({image}, callback_on_step_end=stop_guidance({guidance_stop})).frames",
        ]
    return "\n".join([*lines, "", *load])


def _pipeline_tag(source: Path, facts: Any) -> str | None:
    """What the family says; of other pipelines only their own card knows."""
    name = read_json(source / "model_index.json").get("_class_name")
    known = [family.task for family in families().values() if name in family.pipelines]
    return known[0] if known else facts.get("pipeline_tag")


def _model_card(source: Path, scheme: QuantScheme, layers: int, method: str, guidance_stop: float) -> str:
    given = ModelCard.load(source / _CARD, ignore_metadata_errors=True) if (source / _CARD).is_file() else None
    facts = given.data if given is not None else ModelCardData()
    heading = next((line[2:].strip() for line in (given.text if given else "").splitlines() if line.startswith("# ")), None)
    base = facts.get("model_name") or facts.get("base_model") or heading or "a full-precision pipeline"
    data = ModelCardData(
        license=facts.get("license"),
        license_name=facts.get("license_name"),
        license_link=facts.get("license_link"),
        base_model=facts.get("base_model"),
        library_name="diffusers",
        pipeline_tag=_pipeline_tag(source, facts),
        tags=["qvgen", "quantized", scheme.name.lower()],
    )
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    weights, activations = scheme.weights, scheme.input_activations
    kind = "symmetric" if weights.symmetric else f"asymmetric, {weights.zero_point_domain} zero point"
    inputs = "floating point"
    if activations is not None:
        inputs = f"{activations.num_bits} bits per token, clips for {scheme.timestep_groups} groups of timesteps"
    return f"""---
{data.to_yaml()}
---

# {base}, {scheme.name}

Base model: {base}. {layers} linear layers of its transformer are packed; every other component is unchanged.

| | |
|---|---|
| scheme | {scheme.name} |
| weights | {weights.num_bits} bits per {weights.strategy}, {kind} |
| inputs of packed layers | {inputs} |
{_extra_rows(scheme)}| method | {method} |
| licence | {facts.get("license") or "that of the base model"} |

```python
{_snippet(index["_class_name"], guidance_stop)}
```
"""
