"""Rows that are made a piece at a time, by one run or several, one process or several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from qvgen.sampling.rows import Rows
from qvgen.share import ALONE, Share
from qvgen.tensors import save_tensors

ROWS = "rows"


class Pieces:
    """Rows (n, ...) float32 in pieces of `lengths` rows.

    With `folder` a piece is a file in it, `<name>-00012.safetensors`, which is there when all of it is: a run goes on after
    those that it finds, and of several processes each makes its `share`. So the folder must belong to what determines the
    rows. Without one they are in memory, and this process makes all.
    """

    def __init__(self, lengths: Sequence[int], folder: Path | None = None, name: str = ROWS, share: Share = ALONE) -> None:
        self._lengths, self._folder, self._name = list(lengths), folder, name
        self._share = share if folder is not None else ALONE
        self._in_memory: dict[int, torch.Tensor] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self.todo = [number for number in range(len(lengths)) if self._share.has(number) and not self._is_whole(number)]

    @property
    def found(self) -> int:
        """Rows that this process need not make."""
        return sum(self._lengths) - sum(self._lengths[number] for number in self.todo)

    def add(self, number: int, rows: torch.Tensor) -> None:
        """A piece of `todo`, from any device."""
        rows = rows.to("cpu", torch.float32)
        if self._folder is None:
            self._in_memory[number] = rows
            return
        draft = self._path(number).with_suffix(".draft")
        try:
            save_tensors(draft, {ROWS: rows})
            draft.replace(self._path(number))
        finally:
            draft.unlink(missing_ok=True)

    def tensor(self) -> torch.Tensor:
        """All rows, of a folder in a mapped file in it (`Rows`). Waits for the pieces of other processes."""
        if self._folder is not None:
            self._share.wait(f"{self._folder.name}/{self._name}", self._missing)
        rows = Rows(sum(self._lengths), self._folder)
        for number in range(len(self._lengths)):
            rows.add(self._in_memory.pop(number) if self._folder is None else load_file(self._path(number))[ROWS])
        return rows.tensor()

    def _missing(self) -> list[int]:
        return [number for number in range(len(self._lengths)) if not self._path(number).exists()]

    def _is_whole(self, number: int) -> bool:
        """Whether the piece is there; what a machine that lost its power has cut short is not."""
        if self._folder is None or not self._path(number).exists():
            return False
        try:
            with safe_open(self._path(number), framework="pt") as file:
                return file.get_slice(ROWS).get_shape()[0] == self._lengths[number]
        except SafetensorError:
            return False

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._name}-{number:05d}.safetensors"
