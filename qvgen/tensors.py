"""Tensors to a safetensors file, with the access rights of any other new file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` to `path`, as safetensors' own `save_file` does, and give the file the mode that the umask says.

    `save_file` leaves it readable for its owner alone (0600), because it renames a temporary file: colleagues and servers
    could not read a packed model. A tensor that several names have, as those of a layer in two places, is stored for each of
    them, which `save_file` refuses. It also writes several metadata entries in an order that changes from process to process;
    here they are sorted.
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.open("wb").close()  # the operating system applies umask and default rights of the folder
    mode = path.stat().st_mode & 0o777
    save_file(own_memory(tensors), path, metadata=None if metadata is None else dict(metadata))
    if metadata is not None and len(metadata) > 1:
        _sort_metadata(path)
    path.chmod(mode)


def own_memory(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, contiguous, each in memory of its own, as safetensors wants them."""
    found: dict[str, torch.Tensor] = {}
    seen = set()
    for name, given in tensors.items():
        tensor = given.contiguous()
        if (start := tensor.untyped_storage().data_ptr()) in seen:
            tensor = tensor.clone()
        seen.add(start)
        found[name] = tensor
    return found


def _sort_metadata(path: Path) -> None:
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        again = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(again) > length:
            raise ValueError(f"{path}: its header cannot be written in {length} bytes")
        file.seek(8)
        file.write(again.ljust(length))
