"""Tensors to a safetensors file, with the access rights of any other new file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` to `path`, as safetensors' own `save_file` does, and give the file the mode that the umask says.

    `save_file` leaves it readable for its owner alone (0600), because it renames a temporary file: colleagues and servers
    could not read a packed model.
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.open("wb").close()  # the operating system applies umask and default rights of the folder
    mode = path.stat().st_mode & 0o777
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata=None if metadata is None else dict(metadata))
    path.chmod(mode)
