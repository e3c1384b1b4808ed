"""Latents and text embeddings that stay in their files, or in an object store: a sample is read when it is asked for.

Files are memory-mapped, and few at a time, so that memory does not grow with their number. What is stored in 16 bits comes
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

from qvgen.data.remote import INDEX, RemoteShards

OPEN = 8  # shards mapped at a time
LATENTS, SIZES = "latents", "size_index"  # tensors of a shard; of several sizes latents.0, latents.1, ..., and who has which
LENGTH = "max_sequence_length"  # in the metadata of a text shard: rows of an embedding with its padding


class Shards:
    """The files shard-*.safetensors of a folder, or those that its shards.json lists (data/remote.py), opened when they are
    read. Raises ValueError if there are none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._remote = RemoteShards(folder) if (folder / INDEX).is_file() else None
        self._paths = sorted(folder.glob("shard-*.safetensors"))
        if not self._paths and not self._remote:
            raise ValueError(f"{folder} holds no shard-*.safetensors; run the prepare stage")
        self._open: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files, for a worker process."""
        return vars(self) | {"_open": OrderedDict()}

    def __getitem__(self, number: int) -> Any:
        if number not in self._open:
            if len(self._open) >= OPEN:
                self._open.popitem(last=False)
            self._open[number] = self._remote.open(number) if self._remote else safe_open(self._paths[number], framework="pt")
        self._open.move_to_end(number)
        return self._open[number]

    def open_all(self) -> list[Any]:
        """All at once, for what is read of each in the beginning."""
        return self._remote.open_all() if self._remote else [safe_open(path, framework="pt") for path in self._paths]


class StoredLatents:
    """Latents of a folder of shards, or another of its tensors with a row for each sample; indexed by a slice or a tensor of
    positions, as a tensor (n, ...) would be. Clips may have several sizes: `sizes` are their shapes, `size_index` (n,) says
    which each has, and those read together have one."""

    def __init__(self, folder: Path, name: str = LATENTS) -> None:
        self._shards = Shards(folder)
        opened = self._shards.open_all()
        captions = [file.get_tensor("caption_index") for file in opened]
        self.caption_index = torch.cat(captions)
        self._ends = list(accumulate(map(len, captions)))
        self._keys = set(opened[0].keys())
        numbers: dict[tuple[int, ...], int] = {}
        sizes, rows, self._names = [], [], []
        for file, count in zip(opened, map(len, captions), strict=True):
            several = f"{name}.0" in file.keys()  # noqa: SIM118
            within = file.get_tensor(SIZES) if several else torch.zeros(count, dtype=torch.int64)
            names = [f"{name}.{i}" for i in range(int(within.max()) + 1)] if several else [name]
            shapes = [tuple(file.get_slice(each).get_shape()[1:]) for each in names]
            sizes.append(torch.tensor([numbers.setdefault(shape, len(numbers)) for shape in shapes])[within])
            # A clip's row among those of its size in the shard.
            rows.append(torch.stack([(within == i).cumsum(0) - 1 for i in range(len(names))])[within, torch.arange(count)])
            self._names.append([names[i] for i in within.tolist()] if several else names)
        self.sizes, self.size_index, self._rows = list(numbers), torch.cat(sizes), torch.cat(rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """Raises ValueError for clips of several sizes."""
        return (len(self), *self._size(range(len(self))))

    def __len__(self) -> int:
        return self._ends[-1]

    def has(self, name: str) -> bool:
        """Whether the shards hold such a tensor."""
        return name in self._keys or f"{name}.0" in self._keys

    def __getitem__(self, index: slice | torch.Tensor) -> torch.Tensor:
        """float32. Raises ValueError for NaN and Inf, and for clips of several sizes."""
        wanted = torch.arange(len(self))[index].tolist()
        found = torch.empty((len(wanted), *self._size(wanted)))
        for row, position in enumerate(wanted):
            number, first = _place(self._ends, position)
            name = self._names[number][position - first if len(self._names[number]) > 1 else 0]
            at = int(self._rows[position])
            found[row] = self._shards[number].get_slice(name)[at : at + 1][0]
        if not torch.isfinite(found).all():
            raise ValueError(f"{self._shards.folder} holds NaN or Inf; run the prepare stage again and check the source clips")
        return found

    def _size(self, positions: Sequence[int]) -> tuple[int, ...]:
        if len(self.sizes) == 1:
            return self.sizes[0]
        several = self.size_index[list(positions)].unique().tolist() or [0]
        if len(several) > 1:
            shapes = ", ".join(str(self.sizes[i]) for i in several)
            raise ValueError(f"{self._shards.folder}: clips of several sizes are no batch, latents have shapes {shapes}")
        return self.sizes[several[0]]


class StoredText:
    """Embeddings of captions in a folder of shards, each without its padding; indexed as a tensor (captions, l, d)."""

    def __init__(self, folder: Path) -> None:
        self._shards = Shards(folder)
        opened = self._shards.open_all()
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
    """Rows of `rows`, chosen by `index`: text of samples, which many samples share, or clips of one size."""

    def __init__(self, rows: torch.Tensor | StoredText | StoredLatents, index: torch.Tensor) -> None:
        self.rows, self.index = rows, index
        one = rows.sizes[int(rows.size_index[index[0]])] if isinstance(rows, StoredLatents) else rows.shape[1:]
        self.shape = (len(index), *one)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: slice | torch.Tensor) -> torch.Tensor:
        return self.rows[self.index[index]]


Latents = torch.Tensor | StoredLatents | Selected
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
