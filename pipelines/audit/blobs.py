"""The bytes behind DVC's hashes: in the cache of this checkout, or else in its remote. Read only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from stages.runtime.dvc import open_project


class RemoteError(ValueError):
    """The remote cannot be asked, so nobody knows whether it has something."""


@dataclass
class Remote:
    """A DVC remote. The first failure is its answer to everything after it: each try may take seconds."""

    store: Any
    failure: str | None = field(default=None, init=False)

    def __str__(self) -> str:
        return str(self.store.fs.unstrip_protocol(self.store.path))

    def exists(self, md5: str) -> bool:
        with self._asked():
            return bool(self.store.fs.exists(self.store.oid_to_path(md5)))  # store.exists takes any failure for "no"

    @contextmanager
    def open(self, md5: str) -> Iterator[BufferedIOBase]:
        with self._asked(), self.store.fs.open(self.store.oid_to_path(md5), "rb") as file:
            yield file

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Raises RemoteError; what the library of a service raises has no common class."""
        if self.failure is None:
            try:
                yield
                return
            except Exception as error:
                self.failure = f"the remote {self} cannot be asked ({type(error).__name__}: {error})"
        raise RemoteError(self.failure)


@dataclass(frozen=True)
class Blobs:
    """DVC's cache of this checkout and the default remote, where one is configured."""

    cache: Any
    remote: Remote | None

    @property
    def where(self) -> str:
        remote = f" and the remote {self.remote}" if self.remote is not None else " (no remote is configured)"
        return f"the cache {self.cache.path}{remote}"

    def files(self, md5: str) -> dict[str, str]:
        """Path inside the folder -> hash of each file; for a single file {"": hash}. Raises FileNotFoundError if the
        folder's list is nowhere, ValueError if it is damaged, RemoteError if the remote cannot be asked."""
        if not md5.endswith(".dir"):
            return {"": md5}
        with self.open(md5) as file:
            if file is None:
                raise FileNotFoundError(md5)
            content = file.read()
        try:
            return {str(entry["relpath"]): str(entry["md5"]) for entry in json.loads(content)}
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{md5} is damaged: it is no list of files") from None

    def fault(self, md5: str) -> str | None:
        """None if the bytes of that hash are here: in the cache, hashed again, or else in the remote."""
        path = Path(self.cache.oid_to_path(md5))
        if path.is_file():
            found = file_hash(path, "md5")
            return None if found == md5.removesuffix(".dir") else f"{path} is damaged: its md5 is {found}"
        try:
            stored = self.remote is not None and self.remote.exists(md5)
        except RemoteError as error:
            return f"{md5} is not in the cache, and {error}"
        return None if stored else f"{md5} is missing"

    def sha256(self, md5: str) -> str | None:
        """sha256 of the bytes stored under a DVC hash; None if they are nowhere. Raises RemoteError."""
        with self.open(md5) as file:
            if file is None:
                return None
            return hashlib.file_digest(file, "sha256").hexdigest()

    def in_cache(self, md5: str) -> bool:
        """Whether the cache alone has every file of a hash; not if a folder's list is damaged."""
        if not self.cache.exists(md5):
            return False
        with suppress(ValueError):
            return all(self.cache.exists(file) for file in self.files(md5).values())
        return False

    @contextmanager
    def open(self, md5: str) -> Iterator[BufferedIOBase | None]:
        path = Path(self.cache.oid_to_path(md5))
        if path.is_file():
            with path.open("rb") as file:
                yield file
        elif self.remote is not None and self.remote.exists(md5):
            with self.remote.open(md5) as file:
                yield file
        else:
            yield None


@contextmanager
def open_blobs(root: Path) -> Iterator[Blobs]:
    """The stores that the checkout's DVC configuration names."""
    from dvc.config import NoRemoteError

    with open_project(root) as repo:
        remote = None
        with suppress(NoRemoteError):
            remote = Remote(repo.cloud.get_remote_odb())
        yield Blobs(repo.cache.local, remote)


def file_hash(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
