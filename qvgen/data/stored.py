"""Latents and text embeddings that stay in their files: a sample is read when it is asked for.

Shards are memory-mapped, and few at a time, so that memory does not grow with their number. What is stored in 16 bits comes
back as float32, in which training computes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

OPEN = 8  # shards mapped at a time
LENGTH = "max_sequence_length"  # in the metadata of a text shard: rows of an embedding with its padding


class Shards:
    """The files shard-*.safetensors of a folder, opened when they are read. Raises ValueError if there are none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = sorted(folder.glob("shard-*.safetensors"))
        if not self.paths:
            raise ValueError(f"{folder} holds no shard-*.safetensors; run the prepare stage")
        self._open: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files, for a worker process."""
        return vars(self) | {"_open": OrderedDict()}

    def __getitem__(self, number: int) -> Any:
        if number not in self._open:
            if len(self._open) >= OPEN:
                self._open.popitem(last=False)
            self._open[number] = safe_open(self.paths[number], framework="pt")
        self._open.move_to_end(number)
        return self._open[number]


class StoredLatents:
    """Latents of a folder of shards, or another of its tensors with a row for each sample; indexed by a slice or a tensor of
    positions, as a tensor (n, ...) would be."""

    def __init__(self, folder: Path, name: str = "latents") -> None:
        self._shards, self._name = Shards(folder), name
        opened = [safe_open(path, framework="pt") for path in self._shards.paths]
        self._names = set(opened[0].keys())
        self._ends = list(accumulate(file.get_slice(name).get_shape()[0] for file in opened))
        self.shape = (self._ends[-1], *opened[0].get_slice(name).get_shape()[1:])
        self.caption_index = torch.cat([file.get_tensor("caption_index") for file in opened])

    def __len__(self) -> int:
        return self._ends[-1]

    def has(self, name: str) -> bool:
        """Whether the shards hold such a tensor."""
        return name in self._names

    def __getitem__(self, index: slice | torch.Tensor) -> torch.Tensor:
        """float32. Raises ValueError for NaN and Inf."""
        found = torch.empty((len(wanted := torch.arange(len(self))[index].tolist()), *self.shape[1:]))
        for row, position in enumerate(wanted):
            number, first = _place(self._ends, position)
            found[row] = self._shards[number].get_slice(self._name)[position - first : position - first + 1][0]
        if not torch.isfinite(found).all():
            raise ValueError(f"{self._shards.folder} holds NaN or Inf; run the prepare stage again and check the source clips")
        return found


class StoredText:
    """Embeddings of captions in a folder of shards, each without its padding; indexed as a tensor (captions, l, d)."""

    def __init__(self, folder: Path) -> None:
        self._shards = Shards(folder)
        opened = [safe_open(path, framework="pt") for path in self._shards.paths]
        offsets = [file.get_tensor("offsets").tolist() for file in opened]
        self._ends = list(accumulate(len(part) - 1 for part in offsets))
        self._offsets = offsets
        self.shape = (self._ends[-1], int(opened[0].metadata()[LENGTH]), opened[0].get_slice("rows").get_shape()[1])

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: slice | torch.Tensor) -> torch.Tensor:
        """float32, padded with zeros."""
        found = torch.zeros((len(wanted := torch.arange(len(self))[index].tolist()), *self.shape[1:]))
        for row, position in enumerate(wanted):
            number, first = _place(self._ends, position)
            start, stop = self._offsets[number][position - first : position - first + 2]
            found[row, : stop - start] = self._shards[number].get_slice("rows")[start:stop]
        return found


class Selected:
    """Rows of `rows`, chosen by `index`: text of samples, which many samples share."""

    def __init__(self, rows: torch.Tensor | StoredText, index: torch.Tensor) -> None:
        self.rows, self.index = rows, index
        self.shape = (len(index), *rows.shape[1:])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: slice | torch.Tensor) -> torch.Tensor:
        return self.rows[self.index[index]]


Latents = torch.Tensor | StoredLatents
Text = torch.Tensor | StoredText | Selected


def without_padding(embedding: torch.Tensor) -> torch.Tensor:
    """The rows (l, d) up to the last that is not zero. Wan's pipeline pads with zeros; CogVideoX reads what the encoder makes
    of padding, so nothing of its embeddings is padding."""
    used = embedding.ne(0).any(1).nonzero()
    return embedding[: int(used[-1]) + 1 if len(used) else 0]


def _place(ends: Sequence[int], position: int) -> tuple[int, int]:
    """Number of the shard that holds a position, and the position that it begins with."""
    number = bisect_right(ends, position)
    return number, ends[number - 1] if number else 0
