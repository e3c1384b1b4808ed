"""Shards in an object store, read in blocks: S3, or whatever else fsspec has a driver for.

Training draws clips at random, so a shard is not fetched as a file: the blocks that hold a sample are, in one request; they
stay in the user's cache (qvgen/cache.py). A folder whose shards are elsewhere holds shards.json instead:

    {"store": "s3://bucket/folder", "block": 1048576, "shards": {"shard-00000.safetensors": {"bytes", "sha256", "blocks"}}}

A shard is <store>/<its sha256>.safetensors; `blocks` are the sha256 of its blocks, which each is held against when it comes.
So what DVC knows of such a folder, its hash, covers every byte of the shards.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from qvgen.cache import Blocks

INDEX, MARKER = "shards.json", "qvgen-shards"
BLOCK = 2**20  # bytes; a clip of 49 frames at 480p has 2.6 MB in 16 bits
OPENERS = 16  # threads
_DRIVERS = {"s3": "pip install s3fs", "gs": "pip install gcsfs", "gcs": "pip install gcsfs", "abfs": "pip install adlfs"}
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}


class Store:
    """A folder in an object store. Raises ValueError, with the address and what to do, for all that fails."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self._fs, self._root = self._try(lambda: _connect(self.address))

    def check(self) -> None:
        """That files can be written here, before hours are spent on them."""
        if "file" in self._fs.protocol:  # elsewhere folders are parts of names, and this would make buckets
            self._try(lambda: self._fs.makedirs(self._root, exist_ok=True))
        self._try(lambda: self._fs.pipe_file(f"{self._root}/{MARKER}", b""))

    def upload(self, path: Path, name: str) -> None:
        """A file that is there in its size is not written again: its name is its hash."""
        found = self._try(lambda: self._fs.exists(f"{self._root}/{name}") and self._fs.size(f"{self._root}/{name}"))
        if found != path.stat().st_size:
            self._try(lambda: self._fs.put_file(str(path), f"{self._root}/{name}"))

    def read(self, name: str, start: int, stop: int) -> bytes:
        return self._try(lambda: self._fs.cat_file(f"{self._root}/{name}", start=start, end=stop), name)

    def _try(self, action: Callable[[], Any], name: str = "") -> Any:
        where = f"{self.address}/{name}" if name else self.address
        scheme = self.address.partition("://")[0]
        try:
            return action()
        except ImportError as error:
            remedy = _DRIVERS.get(scheme, "install the driver that it names")
            raise ValueError(f"{where} needs a driver of fsspec that is not here ({error}): {remedy}") from None
        except FileNotFoundError:
            raise ValueError(f"{where} does not exist: check the address (prepare.store), or run the prepare stage") from None
        except Exception as error:  # each driver has classes of its own
            lacking = isinstance(error, PermissionError) or "credential" in str(error).lower()
            remedy = "set what the driver reads, for S3 AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            raise ValueError(
                f"{where} cannot be reached ({type(error).__name__}: {error}): "
                + (f"no access, {remedy}" if lacking else "check address and network")
            ) from None


def _connect(address: str) -> tuple[Any, str]:
    import fsspec

    return fsspec.core.url_to_fs(address)


def describe(path: Path) -> dict[str, Any]:
    """The entry of a file in shards.json."""
    whole, blocks = hashlib.sha256(), []
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            whole.update(block)
            blocks.append(hashlib.sha256(block).hexdigest())
    return {"bytes": path.stat().st_size, "sha256": whole.hexdigest(), "blocks": blocks}


def upload_shards(folder: Path, address: str, on_shard: Callable[[int], object] = lambda shards: None) -> dict[str, Any]:
    """Bring the shards of a folder to a store. Returns what its shards.json is to hold; the folder stays as it is."""
    store, entries = Store(address), {}
    for path in sorted(folder.glob("shard-*.safetensors")):
        entries[path.name] = describe(path)
        store.upload(path, object_name(entries[path.name]))
        on_shard(1)
    return {"store": store.address, "block": BLOCK, "shards": entries}


def replace_shards(folder: Path, index: dict[str, Any]) -> None:
    """Leave shards.json in the place of the shards that were uploaded."""
    (folder / INDEX).write_text(json.dumps(index, indent=0) + "\n", encoding="utf-8")
    for name in index["shards"]:
        (folder / name).unlink()


def object_name(entry: dict[str, Any]) -> str:
    return f"{entry['sha256']}.safetensors"


class RemoteShard:
    """A safetensors file in a store, with the part of `safe_open` that readers of shards use."""

    def __init__(self, store: Store, cache: Blocks, entry: dict[str, Any], block: int) -> None:
        self._store, self._cache, self._entry, self._block = store, cache, entry, block
        length = int.from_bytes(self.read(0, 8), "little")
        if length > entry["bytes"]:
            raise ValueError(f"{store.address}/{object_name(entry)} is no safetensors file; run the prepare stage again")
        self._header: dict[str, Any] = json.loads(self.read(8, 8 + length))
        self._metadata = self._header.pop("__metadata__", None)
        self._data = 8 + length

    def keys(self) -> list[str]:
        return list(self._header)

    def metadata(self) -> dict[str, str] | None:
        return self._metadata

    def get_slice(self, name: str) -> RemoteRows:
        return RemoteRows(self, self._header[name], self._data)

    def get_tensor(self, name: str) -> torch.Tensor:
        rows = self.get_slice(name)
        return rows[0 : rows.get_shape()[0]]

    def read(self, start: int, stop: int) -> bytes:
        """Bytes of the file, out of the cache or the store. Raises ValueError for blocks that are not what was written."""
        numbers = range(start // self._block, -(-stop // self._block))
        found = {number: self._cache.get(self._entry["blocks"][number]) for number in numbers}
        missing = [number for number in numbers if found[number] is None]
        if missing:
            found |= self._fetch(missing[0], missing[-1] + 1)
        content = b"".join(found[number] or b"" for number in numbers)
        return content[start - numbers.start * self._block : stop - numbers.start * self._block]

    def _fetch(self, first: int, until: int) -> dict[int, bytes]:
        name, begin = object_name(self._entry), first * self._block
        content = self._store.read(name, begin, min(until * self._block, self._entry["bytes"]))
        found = {}
        for number in range(first, until):
            block = content[number * self._block - begin : (number + 1) * self._block - begin]
            if hashlib.sha256(block).hexdigest() != self._entry["blocks"][number]:
                raise ValueError(
                    f"{self._store.address}/{name}: block {number} is not what stage prepare wrote, its sha256 is another: "
                    "delete the file and run the prepare stage again"
                )
            self._cache.put(block)
            found[number] = block
        return found


class RemoteRows:
    """A tensor (n, ...) of a shard, of which rows are read."""

    def __init__(self, shard: RemoteShard, entry: dict[str, Any], data: int) -> None:
        self._shard, self._shape = shard, tuple(entry["shape"])
        self._dtype, self._begin = _DTYPES[entry["dtype"]], data + entry["data_offsets"][0]

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(self._shape[0])
        size = math.prod(self._shape[1:]) * self._dtype.itemsize
        shape = (max(0, stop - start), *self._shape[1:])
        if not math.prod(shape):
            return torch.empty(shape, dtype=self._dtype)
        content = bytearray(self._shard.read(self._begin + start * size, self._begin + stop * size))
        return torch.frombuffer(content, dtype=self._dtype).view(shape)


class RemoteShards:
    """The shards that shards.json of a folder lists."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self._entries, self._block = list(index["shards"].values()), int(index["block"])
        self._store, self._cache = Store(index["store"]), Blocks()

    def __len__(self) -> int:
        return len(self._entries)

    def open(self, number: int) -> RemoteShard:
        return RemoteShard(self._store, self._cache, self._entries[number], self._block)

    def open_all(self) -> list[RemoteShard]:
        """Each takes a request."""
        with ThreadPoolExecutor(OPENERS) as pool:
            return list(pool.map(self.open, range(len(self))))
