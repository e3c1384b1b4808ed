"""Places that may have the files of a registered version, the nearest first. None of them is trusted: hashes decide."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from qvgen.hub.address import without_secrets
from qvgen.hub.artifacts import FOLDER, fetch_file, list_files
from qvgen.hub.tracking import Registered

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SCHEMES = ("file", "s3", "gs", "gcs", "az", "abfs", "abfss", "https", "http", "ssh", "sftp")


class Place(Protocol):
    """Somewhere that files can be read from, by their path in the packed folder."""

    name: str  # as a message calls it

    def open(self, model: Registered, path: str) -> AbstractContextManager[IO[bytes]]:
        """Raises FileNotFoundError with the reason, or whatever the library of the place raises."""
        ...

    def has(self, model: Registered, path: str) -> bool:
        """Whether it lists the file; its bytes are not read. Raises as `open` does."""
        ...


class Artifacts:
    """What MLflow has, where `register.upload` copied it."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self._listed: dict[str, set[str]] = {}
        self.name = f"MLflow at {without_secrets(client.tracking_uri)}"

    @contextmanager
    def open(self, model: Registered, path: str) -> Iterator[IO[bytes]]:
        if not model.uploaded:
            raise FileNotFoundError("its files were not uploaded (register.upload: link)")
        with tempfile.TemporaryDirectory() as folder:
            found = fetch_file(self._client, model.location, f"{FOLDER}/{path}", Path(folder))
            with found.open("rb") as file:
                yield file

    def has(self, model: Registered, path: str) -> bool:
        if not model.uploaded:
            return False
        if model.location not in self._listed:
            self._listed[model.location] = {name for name, _ in list_files(self._client, model.model_id, FOLDER)}
        return f"{FOLDER}/{path}" in self._listed[model.location]


class DvcRemote:
    """The DVC remote that the version names, read without DVC: files by their md5, and a list of them."""

    name = "the DVC remote"

    def __init__(self) -> None:
        self._lists: dict[str, dict[str, str]] = {}

    @contextmanager
    def open(self, model: Registered, path: str) -> Iterator[IO[bytes]]:
        with self._file(model, self._md5(model, path)).open() as file:
            yield file

    def has(self, model: Registered, path: str) -> bool:
        found = self._file(model, self._md5(model, path))
        return bool(found.fs.exists(found.path))

    def _md5(self, model: Registered, path: str) -> str:
        if not model.remote or not model.md5:
            raise FileNotFoundError("the version names none")
        if model.md5 not in self._lists:
            with self._file(model, model.md5).open() as file:
                self._lists[model.md5] = {str(entry["relpath"]): str(entry["md5"]) for entry in json.load(file)}
        if path not in self._lists[model.md5]:
            raise FileNotFoundError(f"{without_secrets(model.remote)} does not list {path}")
        return self._lists[model.md5][path]

    def _file(self, model: Registered, md5: str) -> Any:
        import fsspec

        remote = str(model.remote)
        scheme = remote.partition("://")[0] if "://" in remote else "file"
        if scheme not in _SCHEMES:
            raise ValueError(f"its address has the scheme {scheme!r:.40}; read are {', '.join(_SCHEMES)}")
        return fsspec.open(f"{remote.rstrip('/')}/files/md5/{md5[:2]}/{md5[2:]}", "rb")
