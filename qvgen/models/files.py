"""Single files of a model source: which files count, whether one is whole, and reading a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"  # what a folder made by stage fetch records
RECORD = "sha256.json"  # what anybody may put beside a model: {"path": "sha256"}
DENOISERS = ("transformer", "transformer_2")  # component names in diffusers' pipelines; Wan 2.2 A14B has two
EXPERT = "expert"  # in it: of a pipeline with two transformers the one that is trained
GENERATION = "generation.json"  # how this model is meant to be sampled
GUIDANCE = "guidance_scale"  # in it
BESIDE = ("model_index.json", GENERATION, "README.md", "LICENSE")
SUFFIXES = (".safetensors", ".json", ".txt", ".model")  # .model: sentencepiece vocabulary, a plain protobuf
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format
_LONGEST_JSON = 64 << 20  # bytes; the index of a model of 100,000 tensors has 10 MiB
_LFS_POINTER = b"version https://git-lfs"  # first line of what git has in place of a large file


class SourceError(ValueError):
    """The source of a model is unusable: the message names the file or value, and what to do."""


def read_json(path: Path, meaning: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises SourceError for a file that is missing (then with `meaning`), damaged or of another
    kind."""
    try:
        if (found := path.stat().st_size) > _LONGEST_JSON:
            raise SourceError(f"{path} has {found} bytes, more than {_LONGEST_JSON} for a configuration or index")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist, {meaning}".rstrip(", ")) from None
    except IsADirectoryError:
        raise SourceError(f"{path} is a folder, not a file") from None
    except RecursionError:
        raise SourceError(f"{path} nests brackets too deeply") from None
    except SourceError:
        raise
    except ValueError as error:
        raise SourceError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise SourceError(f"{path} must hold an object, found {type(content).__name__}")
    return content


def shards_of(index: Path) -> list[str]:
    """Names of the weight files that an index lists, sorted. Raises SourceError for an index that names other things."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise SourceError(f"{index}: weight_map must map tensors to file names")
    names = sorted(set(named.values()))
    for name in names:
        if Path(name).name != name or "\0" in name:
            raise SourceError(f"{index}: {name!r:.100} is not the name of a file beside it")
    return names


def check_not_pointer(path: Path) -> None:
    """Raises SourceError for a git-lfs pointer: the few lines that a clone without git-lfs has in place of a file."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise SourceError(
                f"{path} is a git-lfs pointer, not the file itself: run `git lfs install` and `git lfs pull` in its folder"
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
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
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


def trained_component(folder: str | Path) -> str:
    """Name of the transformer that the stages train in a pipeline folder: what stage fetch recorded, else `transformer`."""
    path = Path(folder) / MANIFEST
    return str(read_json(path).get(EXPERT) or "transformer") if path.is_file() else "transformer"


def quantizations(folder: str | Path) -> list[dict[str, Any]]:
    """quantization_config of each transformer of a pipeline folder that has one."""
    paths = [path for name in DENOISERS if (path := Path(folder) / name / "config.json").is_file()]
    return [found for path in paths if isinstance(found := read_json(path).get("quantization_config"), dict)]
