"""The user's cache: where it is, and blocks of bytes in it that are named by their hash and take a bounded room together.

blocks/<first two digits>/<sha256>    whole or absent; several processes may use them at once
"""

from __future__ import annotations

import hashlib
import os
import threading
from contextlib import suppress
from pathlib import Path

LIMIT, DEFAULT_GB = "QVGEN_BLOCKS_GB", 50.0
_SLACK = 0.1  # of the limit that a look at the folder makes free, and after which a process looks again


def cache_folder() -> Path:
    """QVGEN_CACHE, else where this system keeps caches of a user."""
    from platformdirs import user_cache_path

    return Path(os.environ["QVGEN_CACHE"]) if os.environ.get("QVGEN_CACHE") else user_cache_path("qvgen")


def limit_bytes() -> int:
    """Bytes that all blocks together may take: QVGEN_BLOCKS_GB, in 10^9. Raises ValueError for what is no such number."""
    given = os.environ.get(LIMIT) or str(DEFAULT_GB)
    try:
        found = float(given)
    except ValueError:
        found = -1.0
    if not 0 <= found < 1e9:
        raise ValueError(f"{LIMIT}={given:.40} is no number of gigabytes: blocks of shards may take so much room in the cache")
    return int(found * 1e9)


class Blocks:
    """Blocks in the user's cache. Those that were not read for the longest time go first when there are too many bytes; what
    several processes write at once may be a tenth too much for each of them."""

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder = folder or cache_folder() / "blocks"
        self.limit = limit_bytes() if limit is None else limit
        self._left = 0.0  # bytes that may be written until the next look

    def get(self, sha256: str) -> bytes | None:
        """The block, or None. One with other bytes, of a machine that lost its power or of a worn disk, is none."""
        path = self._path(sha256)
        try:
            found = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return found if hashlib.sha256(found).hexdigest() == sha256 else None

    def put(self, block: bytes) -> None:
        """Keep a block. Where it cannot be written it is not kept."""
        path = self._path(hashlib.sha256(block).hexdigest())
        draft = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                draft.write_bytes(block)
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
        self._left -= len(block)
        if self._left < 0:
            self._left = self._make_room()

    def _make_room(self) -> float:
        """Delete what is too much. Returns how many bytes fit then."""
        found = []
        for path in self.folder.glob("*/*"):
            with suppress(OSError):  # another process was first
                state = path.stat()
                found.append((state.st_mtime_ns, state.st_size, path))
        total = sum(size for _, size, _ in found)
        goal = self.limit if total <= self.limit else self.limit * (1 - _SLACK)
        for _, size, path in sorted(found):
            if total <= goal:
                break
            with suppress(OSError):
                path.unlink()
            total -= size
        return min(self.limit - total, self.limit * _SLACK)

    def _path(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256
