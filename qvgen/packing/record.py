"""What a packed weight file records of itself: a sha256 per tensor and the fields of config.json, in its safetensors metadata.

    save_file(tensors, path, metadata={"format": "pt", **record(tensors, config)})
    verify([path])                      # ValueError that names the tensor or field which is not what was recorded

It finds damage, not forgery: whoever rewrites the file can rewrite the record. A hash covers dtype, shape and bytes. sha256:
hashlib has it, it runs beside other threads, and a core with SHA instructions reads 1.6 GB/s (`openssl speed -evp sha256`).
The fields are recorded as they are, not as a hash, so that a message can show both values.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from qvgen.tensors import DTYPE_NAMES

KEY = "qvgen"  # of the metadata; its value is one JSON text
_PIECE = 1 << 24  # bytes hashed at a time


def record(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, str]:
    """The metadata entry for a file, or files, of `tensors` beside a config.json with these contents. Deterministic.

    Raises ValueError for a dtype that a safetensors file of ours does not have.
    """
    if odd := {str(tensor.dtype) for tensor in tensors.values() if tensor.dtype not in DTYPE_NAMES}:
        raise ValueError(f"no hash is defined for tensors of {', '.join(sorted(odd))}")
    with _pool() as pool:
        hashes = dict(zip(tensors, pool.map(_hash_tensor, tensors.values()), strict=True))
    return {KEY: json.dumps({"sha256": hashes, "config": model_fields(config)}, sort_keys=True, separators=(",", ":"))}


def model_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json that say which model it is: all but diffusers' version, the path and other private ones."""
    return {name: value for name, value in config.items() if name == "_class_name" or not name.startswith("_")}


def is_asked_for() -> bool:
    """Whether loading verifies what files record: unless QVGEN_VERIFY=0. Raises ValueError for another value."""
    asked = os.environ.get("QVGEN_VERIFY", "1")
    if asked not in ("0", "1"):
        raise ValueError(f"QVGEN_VERIFY={asked!r:.40} must be 1 (the default) or 0, which loads packed files unverified")
    return asked == "1"


def verify(files: Iterable[str | Path]) -> int:
    """Compare the safetensors files of a folder, and config.json in it, with what the files record; return the number of
    tensors compared. 0: the files record nothing, as those of earlier versions.

    Raises ValueError, naming tensor or field, for a tensor or field that differs or was added, and if some of the files
    record nothing. That a tensor is missing is for the loading to find.
    """
    headers = {path: _header(path) for path in map(Path, files)}
    found = _checked_fields(headers)
    for path, hashes in found.items():
        _check_tensors(path, hashes, *headers[path])
    return sum(len(headers[path][0]) for path in found)


def verify_fields(files: Iterable[str | Path]) -> None:
    """Compare only config.json beside the files with what they record; no tensor is read. Raises ValueError as `verify`."""
    _checked_fields({path: _header(path) for path in map(Path, files)})


def _checked_fields(headers: Mapping[Path, tuple[dict[str, Any], int]]) -> dict[Path, dict[str, str]]:
    """The hashes that each file records, by tensor; none if no file records any. config.json was compared."""
    paths = list(headers)
    found = {path: _recorded(path, header) for path, (header, _) in headers.items()}
    bare = [path.name for path, entry in found.items() if entry is None]
    if len(bare) == len(paths):
        return {}
    if bare:
        raise ValueError(f"{paths[0].parent}: {bare[0]} records no hashes, files beside it do; the folder is a mixture")
    configs: dict[Path, dict[str, Any]] = {}
    hashes = {}
    for path, entry in found.items():
        assert entry is not None
        if path.parent not in configs:  # links (the hub's cache) have their config.json beside them: resolve nothing
            configs[path.parent] = model_fields(json.loads((path.parent / "config.json").read_text(encoding="utf-8")))
        _check_fields(path.parent / "config.json", entry["config"], configs[path.parent])
        hashes[path] = entry["sha256"]
    return hashes


def _check_tensors(path: Path, recorded: dict[str, str], header: dict[str, Any], start: int) -> None:
    if unknown := sorted(header.keys() - recorded.keys()):
        raise ValueError(f"{path}: {unknown[0]!r:.200} is not among the tensors it was written with; get the file again")
    if not header:
        return
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as content,
        _pool() as pool,
    ):

        def hash_entry(name: str) -> str:
            entry = header[name]
            begin, end = (start + offset for offset in entry["data_offsets"])
            with content[begin:end] as own:
                return _hash(entry["dtype"], entry["shape"], own)

        names = sorted(header, key=lambda name: header[name]["data_offsets"])  # as they lie on the disk
        for name, found in zip(names, pool.map(hash_entry, names), strict=True):
            if found != recorded[name]:
                raise ValueError(
                    f"{name}: sha256 is {found[:16]}..., {path} records {recorded[name]!s:.16}...; the file is damaged, "
                    "export it or get it again"
                )


def _check_fields(path: Path, recorded: Any, found: Any, name: str = "") -> None:
    """Raise ValueError that names the first field which is not of the recorded type and value."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        for key in sorted(recorded.keys() | found.keys()):
            field = f"{name}.{key}" if name else key
            if key not in recorded or key not in found:
                has = "is not among the recorded fields" if key in found else "is missing"
                raise ValueError(
                    f"{path}: {field!s:.200} {has}; it was changed after the weights were written: get both again"
                )
            _check_fields(path, recorded[key], found[key], field)
    elif isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        for index, pair in enumerate(zip(recorded, found, strict=True)):
            _check_fields(path, *pair, f"{name}[{index}]")
    elif type(recorded) is not type(found) or repr(recorded) != repr(found):
        raise ValueError(
            f"{path}: {name} = {found!r:.100}, the weights beside it were written for {recorded!r:.100}; get both again"
        )


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Entries of a safetensors file, and where its tensors begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _recorded(path: Path, header: dict[str, Any]) -> dict[str, Any] | None:
    """What the file records, taken out of its header. Raises ValueError if it is not what `record` writes."""
    text = header.pop("__metadata__", {}).get(KEY)
    if text is None:
        return None
    try:
        entry = json.loads(text)
        if not all(isinstance(entry[key], dict) for key in ("sha256", "config")):
            raise TypeError
    except (ValueError, TypeError, LookupError, RecursionError):
        raise ValueError(f"{path}: its record of hashes is damaged; get the file again") from None
    return entry


def _hash_tensor(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return _hash(DTYPE_NAMES[tensor.dtype], list(tensor.shape), flat.numpy().data)


def _hash(dtype: str, shape: list[int], content: memoryview) -> str:
    digest = hashlib.sha256(f"{dtype} {shape}\n".encode())
    for begin in range(0, len(content), _PIECE):
        digest.update(content[begin : begin + _PIECE])
    return digest.hexdigest()


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))
