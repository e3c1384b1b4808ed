"""Where a full-precision model comes from, and whether it is what it claims to be.

A source is a diffusers pipeline folder, or a hub repository pinned by commit. Only safetensors are accepted, because
loading any other weight format can run code of whoever wrote the file; the bytes of every file are recorded by sha256.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

PIPELINES = ("WanPipeline", "CogVideoXPipeline")
MANIFEST = "manifest.json"  # what a folder made by stage fetch records
RECORD = "sha256.json"  # what anybody may put beside a model: {"path": "sha256"}
BESIDE = ("model_index.json", "generation.json", "README.md", "LICENSE")
SUFFIXES = (".safetensors", ".json", ".txt", ".model")  # .model: sentencepiece vocabulary, a plain protobuf
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_LIBRARIES = ("diffusers", "transformers")
_CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format


class SourceError(ValueError):
    """The source of a model is unusable: the message names the file or value, and what to do."""


@dataclass(frozen=True)
class FileRecord:
    sha256: str
    bytes: int


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

    Raises SourceError for a folder that is no supported diffusers pipeline, custom code, a component without
    configuration or weights, a missing shard, a pickle, and a truncated safetensors file.
    """
    folder = Path(folder)
    index = _read_json(
        folder / "model_index.json", "so this is not a diffusers pipeline folder; give the folder above transformer/"
    )
    pipeline_class = index.get("_class_name")
    if pipeline_class not in PIPELINES:
        raise SourceError(f"{folder}: pipeline {pipeline_class!r} is not supported; supported: {', '.join(PIPELINES)}")
    components = tuple(sorted(name for name, kind in index.items() if _is_component(folder, name, kind)))
    files = [name for name in BESIDE if (folder / name).is_file()]
    for component in components:
        files += _component_files(folder, component)
    return Pipeline(folder, pipeline_class, components, tuple(sorted(files)))


def hash_files(
    folder: str | Path, files: Iterable[str], on_bytes: Callable[[int], object] = lambda count: None
) -> dict[str, FileRecord]:
    """sha256 and size of each file; `on_bytes` is called with the size of each piece read."""
    records = {}
    for name in files:
        digest, total = hashlib.sha256(), 0
        with (Path(folder) / name).open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
                total += len(piece)
                on_bytes(len(piece))
        records[name] = FileRecord(digest.hexdigest(), total)
    return records


def recorded_hashes(folder: str | Path) -> dict[str, str] | None:
    """Path -> sha256 as recorded in the folder's manifest.json or sha256.json; None if it has neither."""
    folder = Path(folder)
    for name in (MANIFEST, RECORD):
        if (folder / name).is_file():
            record = _read_json(folder / name)
            entries = record.get("files", record)
            return {path: entry["sha256"] if isinstance(entry, dict) else entry for path, entry in entries.items()}
    return None


def check_hashes(found: Mapping[str, FileRecord], recorded: Mapping[str, str], where: str | Path) -> None:
    """Raises SourceError that lists every file that was changed, removed or added after it was recorded."""
    ours = {path: sha for path, sha in recorded.items() if _belongs(path, found)}
    faults = [f"{path}: is missing" for path in ours if path not in found]
    for path, file in found.items():
        if path not in ours:
            faults.append(f"{path}: was added")
        elif ours[path] != file.sha256:
            faults.append(f"{path}: expected sha256 {ours[path]}, found {file.sha256}")
    if faults:
        listed = "\n  ".join(sorted(faults))
        raise SourceError(
            f"{where} is not what its record says:\n  {listed}\n"
            "Get the files again from where they came from, or delete the record if you changed them on purpose"
        )


def check_safetensors(path: str | Path) -> None:
    """Raises SourceError for a file that is not whole: its header says how long it must be."""
    path = Path(path)
    found = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if found < 8 or length > _LONGEST_HEADER:
            raise SourceError(f"{path} is not a safetensors file: {found} bytes, header of {length} bytes")
        if found < 8 + length:
            raise _truncated(path, f"at least {8 + length}", found)
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SourceError(f"{path} has a damaged safetensors header ({error})") from None
    expected = 8 + length + max(ends, default=0)
    if found != expected:
        raise _truncated(path, str(expected), found)

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as tensors:
            tensors.keys()
    except SafetensorError as error:
        raise SourceError(f"{path} is not a valid safetensors file ({error}); get the file again") from None


def _truncated(path: Path, expected: str, found: int) -> SourceError:
    return SourceError(f"{path} is cut short or has extra bytes: expected {expected} bytes, found {found}; get it again")


def _download(source: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*BESIDE, *(f"*{suffix}" for suffix in SUFFIXES)]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(f"{source} at {revision[:8]} could not be downloaded: {error}") from None


def _read_json(path: Path, meaning: str = "") -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist, {meaning}".rstrip(", ")) from None
    except ValueError as error:
        raise SourceError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise SourceError(f"{path} must hold an object, found {type(content).__name__}")
    return content


def _is_component(folder: Path, name: str, kind: Any) -> bool:
    """Whether an entry of model_index.json names a component folder; refuses custom code and paths."""
    if name.startswith("_") or not isinstance(kind, list) or len(kind) != 2 or kind[1] is None:
        return False
    if not re.fullmatch(r"\w+", name):
        raise SourceError(f"{folder / 'model_index.json'}: {name!r} is not a component name")
    if kind[0] not in _LIBRARIES:
        raise SourceError(
            f"{folder / 'model_index.json'}: component {name} is code of {kind[0]!r}; only {' and '.join(_LIBRARIES)} "
            "are allowed, code that comes with a model is never run"
        )
    return True


def _component_files(folder: Path, component: str) -> list[str]:
    present = sorted(p for p in (folder / component).rglob("*") if p.is_file())
    for path in present:
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
        for shard in sorted(set(_read_json(shards).get("weight_map", {}).values())):
            if shards.with_name(shard) not in present:
                raise SourceError(f"{shards.with_name(shard)} is missing, but {shards.name} names it; get it again")
    for path in weights:
        check_safetensors(path)
    return [str(PurePosixPath(p.relative_to(folder))) for p in present if p.suffix in SUFFIXES]


def _belongs(path: str, found: Mapping[str, FileRecord]) -> bool:
    """Whether a recorded path lies in the pipeline: a record may also cover what is beside it, such as scripts."""
    folders = {name.partition("/")[0] for name in found if "/" in name}
    top, slash, _ = path.partition("/")
    return (top in folders and Path(path).suffix in SUFFIXES) if slash else path in BESIDE
