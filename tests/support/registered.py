"""Packed folders in a real MLflow registry, put there as stage register does, without the stages before it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow import MlflowClient

from qvgen.kernels.cpu import library
from stages.record.model.flavour import flavour_of
from stages.record.model.version import FLAVOUR, UPLOAD, register_version

ROOT = Path(__file__).parents[2]


def make_wish(
    folder: Path, name: str, content: Mapping[str, bytes], *, upload: str = "copy", cached: bool = True, **tags: str
) -> dict[str, Any]:
    """What stage register asks for, of the packed folder `folder`/packed with this content; unless not `cached` also in
    DVC's cache, `folder`/files/md5, with the list that DVC makes of a folder."""
    packed, cache = folder / "packed", folder / "files" / "md5"
    files, listed = {}, []
    for path, data in content.items():
        files[path] = {"sha256": hashlib.sha256(data).hexdigest(), "md5": _md5(data), "bytes": len(data)}
        listed.append({"md5": _md5(data), "relpath": path})
        (packed / path).parent.mkdir(parents=True, exist_ok=True)
        (packed / path).write_bytes(data)
        if cached:
            _blob(cache, _md5(data), data)
    list_of_files = json.dumps(listed).encode()
    md5 = f"{_md5(list_of_files)}.dir"
    if cached:
        _blob(cache, md5, list_of_files)
    known = {"dvc.md5": md5, "dvc.path": "artifacts/packed", UPLOAD: upload}
    return {
        "name": name,
        "alias": "challenger",
        "identity": f"{name} {md5}",
        "tags": {f"sha256.{path}": record["sha256"] for path, record in files.items()} | known | tags,
        "params": {"quantization": "W4A4"},
        "metrics": {"psnr_db": 30.0},
        "upload": upload,
        "files": files,
        "folder": str(packed),
        "cache": str(cache),
        "description": f"`qvgen pull models:/{name}/{{version}} --out DIR`",
    }


def packed_wish(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    """`make_wish` of a real packed pipeline, `folder`/packed, with what MLflow needs to load it."""
    wish = make_wish(folder, name, read_folder(folder / "packed"), **options)
    hashes = {path: record["sha256"] for path, record in wish["files"].items()}
    texts = flavour_of(folder / "packed", name, hashes, ROOT, "a red digit three")
    tags = {f"{FLAVOUR}{path}": hashlib.sha256(text.encode()).hexdigest() for path, text in texts.items()}
    return wish | {"texts": texts, "tags": wish["tags"] | tags}


def register(client: MlflowClient, wish: dict[str, Any]) -> Any:
    """The version, by a run of the experiment "upload", the same one for the same wish, as a journal that is sent again."""
    experiment = client.get_experiment_by_name("upload")
    id = experiment.experiment_id if experiment else client.create_experiment("upload")
    runs = client.search_runs([id], f"tags.wish = '{wish['identity']}'")
    run = runs[0] if runs else client.create_run(id, tags={"wish": wish["identity"]})
    return register_version(client, id, run.info.run_id, wish, contextlib.nullcontext)


def read_folder(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _blob(cache: Path, md5: str, data: bytes) -> None:
    path = cache / md5[:2] / md5[2:]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o444)


class Line:
    """A line to a server that can be cut: clients see a server that is down."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._server = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        # A thread that waits in accept() would still take one connection.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._carry, args=(self._listener.accept()[0],), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(self._server) as server:
            other = {client: server, server: client}
            while True:
                for ready in select.select(list(other), [], [])[0]:
                    data = ready.recv(65536)
                    if not data:
                        return
                    other[ready].sendall(data)


def outside(venv: Path, folder: Path, mlflow_server: str) -> dict[str, str]:
    """All variables of a process of the environment `venv` (tests/support/fresh_venv.py) that knows an address of MLflow and
    nothing else: PATH holds the environment alone, so neither git nor DVC. `folder` is its home, and has its cache."""
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    own = {"PATH": str(venv / "bin"), "HOME": str(folder), "LANG": "C.UTF-8"}
    built = [path for path in library._candidates() if path.exists()]
    if built:  # which the wheel of the tests lacks
        own[library.LIBRARY_ENVIRONMENT] = str(built[0])
    return quiet | own | {"MLFLOW_TRACKING_URI": mlflow_server, "QVGEN_CACHE": str(folder / "cache")}


@contextmanager
def using(address: str, cache: Path) -> Iterator[None]:
    """This process finds MLflow at `address` and keeps models in `cache`."""
    new = {"MLFLOW_TRACKING_URI": address, "QVGEN_CACHE": str(cache)}
    old = {name: os.environ.get(name) for name in new}
    os.environ.update(new)
    try:
        yield
    finally:
        for name, value in old.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
