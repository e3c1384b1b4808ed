"""Tensors to a safetensors file, with the access rights of any other new file; also of models that several processes hold in
parts: the file that one process would write, made one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from qvgen.sharded import is_sharded, whole

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip  (in a safetensors header)
Shapes = Mapping[str, tuple[int, ...]]


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
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
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
