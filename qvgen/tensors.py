"""Tensors to a safetensors file, with the access rights of any other new file; also of models that several processes hold in
parts: the file that one process would write, made one tensor at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from qvgen.sharded import is_sharded, whole

# As a safetensors header has them, in the order in which safetensors' own writer stores them.
DTYPE_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Shapes = Mapping[str, tuple[int, ...]]


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` to `path`: the bytes that safetensors' own `save_file` writes, one tensor after the other, beside it and
    renamed. Raises ValueError for a dtype that is none of DTYPE_NAMES.

    `save_file` copies all tensors before it writes the first: a state of training would be in memory twice. It also leaves the
    file readable for its owner alone (0600), so that colleagues and servers could not read a packed model, refuses a tensor
    that several names have, as those of a layer in two places, and writes metadata in an order that changes from process to
    process; here it is sorted.
    """
    path = Path(path)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with new.open("wb") as file:
            file.writelines(_file(tensors, {}, metadata))
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


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


def save_gathered(
    path: Path | None,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    shapes: Shapes = MappingProxyType({}),
) -> None:
    """Write `tensors` as `save_tensors` does, of those in `shapes` the part of that shape.

    If any is sharded, all processes that hold it make this call, with the same names; the first has a path, for the others it
    is None. Each gathers a tensor at a time and forgets it.
    """
    if not any(is_sharded(tensor) for tensor in tensors.values()):
        if path is not None:
            save_tensors(path, tensors, metadata)
        return
    parts = _file(tensors, shapes, metadata)
    try:
        if path is not None:
            with path.open("wb") as file:
                file.writelines(parts)
    finally:
        for _ in parts:  # the others wait for it, also if the disk is full
            pass


def _file(tensors: Mapping[str, torch.Tensor], shapes: Shapes, metadata: Mapping[str, str] | None) -> Iterator[memoryview]:
    """A safetensors file in pieces: its header, and every tensor."""
    rank = {dtype: number for number, dtype in enumerate(DTYPE_NAMES)}
    for name, tensor in tensors.items():
        if tensor.dtype not in rank:
            raise ValueError(f"{name} is {tensor.dtype}, which is not stored; cast it to one of {', '.join(map(str, rank))}")
    order = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        tensor, shape = tensors[name], list(shapes.get(name, tensors[name].shape))
        begin, end = end, end + math.prod(shape) * tensor.dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in order:
        tensor = whole(tensors[name].detach())
        part = tensor[tuple(slice(size) for size in shapes.get(name, tensor.shape))]
        yield part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
