"""Where a full-precision model comes from, and whether it is what it claims to be.

A source is a diffusers pipeline folder, or a hub repository pinned by commit. Only safetensors are accepted, because
loading any other weight format can run code of whoever wrote the file; the bytes of every file are recorded by sha256.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qvgen.models.files import (
    BESIDE,
    DENOISERS,
    MANIFEST,
    RECORD,
    SUFFIXES,
    SourceError,
    check_not_pointer,
    check_safetensors,
    read_json,
    shards_of,
)

COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")  # that the stages read; all are needed
# That a family needs or may have besides (`Family.needed`, `Family.optional`).
OTHERS = ("image_encoder", "image_processor", "transformer_2")
OTHERS += ("text_encoder_2", "text_encoder_3", "tokenizer_2", "tokenizer_3")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Weights beside the folders of components are those of the model's own code, as of FLUX.1 [dev], 24 GB: they are left.
DOWNLOADED = [*BESIDE, MANIFEST, RECORD, *(f"*/*{suffix}" for suffix in SUFFIXES)]
_LIBRARIES = ("diffusers", "transformers")
_CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Pipeline:
    """A diffusers pipeline folder whose structure has been checked."""

    folder: Path
    pipeline_class: str
    components: tuple[str, ...]  # names of the component folders
    files: tuple[str, ...]  # relative paths of what belongs to the pipeline, sorted


def resolve_source(source: str, revision: str | None, root: str | Path = ".") -> Path:
    """Folder of a model source; a hub repository is downloaded, or found in the local hub cache.

    Raises SourceError for a source that is neither a folder nor a hub id, a hub id without its commit, a folder with
    one, and a download that fails.
    """
    folder = Path(root) / source
    if folder.is_dir():
        if revision is not None:
            raise SourceError(f"fetch.revision = {revision!r} belongs to a hub id, but {source} is a folder: set it to null")
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise SourceError(f"fetch.source = {source!r} is neither a folder nor a hub id such as org/name")
    if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise SourceError(
            f"fetch.source = {source!r} is not a folder here; as a hub id it needs fetch.revision, the commit to use "
            f"(40 hex digits), found {revision!r}. A branch or tag may move, so it is not accepted"
        )
    return _download(source, revision)


def read_pipeline(folder: str | Path) -> Pipeline:
    """Check the structure of a pipeline folder without reading its weights, in well under a second.

    Raises SourceError for a folder that is no supported diffusers pipeline, custom code, a component that the stages would
    ignore, one without configuration or weights, a missing shard, a pickle, a git-lfs pointer and a truncated safetensors
    file.
    """
    from qvgen.models.registry import family_class  # imports torch

    folder = Path(folder)
    index = read_json(
        folder / "model_index.json", "so this is not a diffusers pipeline folder; give the folder above transformer/"
    )
    pipeline_class = str(index.get("_class_name"))
    try:
        family = family_class(pipeline_class)
    except SourceError as error:
        raise SourceError(f"{folder}: {error}") from None
    components = tuple(sorted(name for name, kind in index.items() if _is_component(folder, name, kind)))
    _check_components(folder, pipeline_class, components, COMPONENTS + family.needed, family.optional)
    files = [name for name in BESIDE if (folder / name).is_file()]
    for component in components:
        files += _component_files(folder, component)
    if refusal := family.refusal(index, read_json(folder / "transformer" / "config.json")):
        raise SourceError(f"{folder}: {refusal:.300}")
    return Pipeline(folder, pipeline_class, components, tuple(sorted(files)))


def check_expert(expert: str | None, pipeline: Pipeline) -> str | None:
    """`expert`, the value of fetch.expert. Raises SourceError if it names a transformer that the pipeline does not have, or is
    missing for one of two."""
    both = [name for name in DENOISERS if name in pipeline.components]
    if len(both) > 1 and expert is None:
        raise SourceError(
            f"{pipeline.folder} has two transformers, each for its noise levels: set fetch.expert to {' or '.join(both)}, the "
            "one to train; a second run trains the other (docs/your-own-model.md)"
        )
    if expert is not None and len(both) < 2:
        raise SourceError(f"fetch.expert = {expert!r}, but {pipeline.folder} has one transformer: set it to null")
    return expert


def _download(source: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=DOWNLOADED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(f"{source} at {revision[:8]} could not be downloaded: {error}") from None


def _is_component(folder: Path, name: str, kind: Any) -> bool:
    """Whether an entry of model_index.json names a component folder; refuses custom code and paths."""
    if name.startswith("_") or not isinstance(kind, list) or len(kind) != 2 or kind[1] is None:
        return False
    if not re.fullmatch(r"\w+", name):
        raise SourceError(f"{folder / 'model_index.json'}: {name!r:.100} is not a component name")
    if kind[0] not in _LIBRARIES:
        raise SourceError(
            f"{folder / 'model_index.json'}: component {name} is code of {kind[0]!r:.100}; only {' and '.join(_LIBRARIES)} "
            "are allowed, code that comes with a model is never run"
        )
    return True


def _check_components(
    folder: Path, pipeline_class: str, components: tuple[str, ...], needed: tuple[str, ...], optional: tuple[str, ...]
) -> None:
    """A component that is ignored would stay in full precision, unmeasured, and yet make part of every video."""
    if ignored := [name for name in components if name not in needed + optional]:
        raise SourceError(
            f"{folder} has component {', '.join(ignored)}, which the stages would ignore; {pipeline_class} is supported with "
            f"{', '.join(needed + optional)} alone"
        )
    if missing := [name for name in needed if name not in components]:
        raise SourceError(f"{folder / 'model_index.json'} names no {' and no '.join(missing)}: the pipeline is incomplete")


def _component_files(folder: Path, component: str) -> list[str]:
    present = sorted(p for p in (folder / component).rglob("*") if p.is_file())
    for path in present:
        check_not_pointer(path)
        if path.suffix in PICKLES:
            raise SourceError(
                f"{path} is a pickle, and loading one can run any code: delete it if there are safetensors beside it, "
                "else load the model where you trust it and write it with save_pretrained(folder)"
            )
    configs = [p for p in present if p.name in _CONFIGS]
    if not configs:
        raise SourceError(f"{folder / component} has no {' or '.join(_CONFIGS)}: component {component} is missing")
    weights = [p for p in present if p.suffix == ".safetensors"]
    if not weights and any(p.name == "config.json" for p in configs):
        raise SourceError(f"{folder / component} has no .safetensors file: the weights of {component} are missing")
    for shards in (p for p in present if p.name.endswith(".safetensors.index.json")):
        for shard in shards_of(shards):
            if shards.with_name(shard) not in present:
                raise SourceError(f"{shards.with_name(shard)} is missing, but {shards.name} names it; get it again")
    for path in weights:
        check_safetensors(path)
    return [str(PurePosixPath(p.relative_to(folder))) for p in present if p.suffix in SUFFIXES]


def check_links(pipeline: Pipeline) -> None:
    """Raises SourceError if a file of the pipeline is a link to somewhere else, whose content a copy would take along.

    A snapshot in the hub's cache is made of links into the blobs of the same repository, which belong to it.
    """
    inside = [pipeline.folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parents[1] / "blobs")
    for name in pipeline.files:
        target = (pipeline.folder / name).resolve()
        if not any(target.is_relative_to(folder) for folder in inside):
            raise SourceError(f"{pipeline.folder / name} is a link to {target}, outside the model: put the file itself there")
