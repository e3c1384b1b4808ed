"""A tensor that is filled a few rows at a time: in memory, or in a file that the system may write out when memory is short."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch


class Rows:
    """`count` rows (count, ...) float32 on the CPU. With `folder` they lie in a mapped file there, which has no name any more
    and goes when the tensor does. Raises OSError where there is no room for it."""

    def __init__(self, count: int, folder: Path | None = None) -> None:
        self._count, self._folder, self._filled = count, folder, 0
        self._rows: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """The next rows (n, ...), from any device."""
        if self._rows is None:
            self._rows = self._empty((self._count, *rows.shape[1:]))
        self._rows[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)

    def tensor(self) -> torch.Tensor:
        assert self._rows is not None and self._filled == self._count
        return self._rows

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        if self._folder is None:
            return torch.empty(shape)
        path = self._folder / f"rows-{os.getpid()}-{id(self)}"
        size = 4 * math.prod(shape)
        try:
            with path.open("wb") as file:
                # Now: a full disk would end the process when the pages are written.
                os.posix_fallocate(file.fileno(), 0, size) if hasattr(os, "posix_fallocate") else file.truncate(size)
            return torch.from_file(str(path), shared=True, size=size // 4, dtype=torch.float32).view(shape)
        finally:
            path.unlink(missing_ok=True)
