"""The files of a packed model go to MLflow: streamed, file by file, and gone on with where they were cut short.

Each file is taken by its hash: from DVC's cache, else from the packed folder, which a later run may have replaced before a
journal is sent. Where MLflow keeps its files on the disk of DVC's cache, a file is stored once: MLflow gets a clone of it
(a file system that can) or a link to it. Nothing writes into either: both are made whole and only read.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvgen.hub.artifacts import FOLDER, list_files, local_folder
from qvgen.models.hashes import hash_files

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

SLOWEST = 1e6  # bytes per second, of a store that is waited for
_FICLONE = 0x40049409  # ioctl of Linux: the blocks of another file, shared until one of both is written
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"


def upload_files(client: MlflowClient, model: LoggedModel, wish: dict[str, Any]) -> None:
    """Make `wish`'s files and texts those of `model`; what is there already, whole, is left. The file MLmodel comes last, so
    that nothing loads half a model.

    Raises FileNotFoundError for a file that is nowhere with the hash it was registered with, and what MLflow raises.
    """
    place = local_folder(model.artifact_location)
    present = {} if place is not None else _sizes(client, model.model_id, FOLDER)
    for name, record in wish["files"].items():
        source, target = _source(wish, name, record), f"{FOLDER}/{name}"
        if place is not None:
            if not _is(place / target, record):
                _store_once(source, place / target)
        elif present.get(target) != record["bytes"]:
            with _patience(record["bytes"]):
                _send(client, model.model_id, source, target)
    texts = wish.get("texts", {})
    for name in sorted(texts, key=lambda name: name == "MLmodel"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            path.write_text(texts[name])
            client.log_model_artifact(model.model_id, str(path), str(Path(name).parent) if "/" in name else None)


def _sizes(client: MlflowClient, model_id: str, folder: str) -> dict[str, int]:
    return dict(list_files(client, model_id, folder))


def _source(wish: dict[str, Any], name: str, record: dict[str, Any]) -> Path:
    """A file with the registered bytes, read once to be sure of it."""
    md5 = record["md5"]
    for path in (Path(wish["cache"]) / md5[:2] / md5[2:], Path(wish["folder"]) / name):
        if _is(path, record):
            return path
    raise FileNotFoundError(
        f"{name} with sha256 {record['sha256'][:12]}... is neither in {wish['cache']} nor in {wish['folder']}: a later run "
        "has replaced it; `dvc repro --force register` registers what is there now"
    )


def _is(path: Path, record: dict[str, Any]) -> bool:
    if not path.is_file() or path.stat().st_size != record["bytes"]:
        return False
    return hash_files(path.parent, [path.name])[path.name].sha256 == record["sha256"]


def _send(client: MlflowClient, model_id: str, source: Path, target: str) -> None:
    """MLflow names a file as it is named here; a blob of DVC's cache is called by its hash."""
    if source.name == Path(target).name:
        client.log_model_artifact(model_id, str(source), str(Path(target).parent))
        return
    with tempfile.TemporaryDirectory() as folder:
        alias = Path(folder) / Path(target).name
        alias.symlink_to(source.resolve())
        client.log_model_artifact(model_id, str(alias), str(Path(target).parent))


def _store_once(source: Path, target: Path) -> None:
    """The file `source` under another name, with its bytes stored once where the file system can do it. Only a file that
    nobody may write, such as those of DVC's cache, is linked to."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if not _clone(source, draft):
            draft.unlink(missing_ok=True)
            linked = False
            if not source.stat().st_mode & 0o222:
                with suppress(OSError):  # another disk
                    os.link(source, draft)
                    linked = True
            if not linked:
                shutil.copyfile(source, draft)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def _clone(source: Path, draft: Path) -> bool:
    with source.open("rb") as old, draft.open("wb") as new, suppress(OSError):
        fcntl.ioctl(new, _FICLONE, old.fileno())
        return True
    return False


@contextmanager
def _patience(size: int) -> Iterator[None]:
    """A server answers an upload only when it has stored the file elsewhere, which may take longer than other answers."""
    before = os.environ.get(_TIMEOUT)
    os.environ[_TIMEOUT] = str(max(int(before or 0), 30 + int(size / SLOWEST)))
    try:
        yield
    finally:
        if before is None:
            del os.environ[_TIMEOUT]
        else:
            os.environ[_TIMEOUT] = before
