"""Files of a logged model in MLflow: where they lie, which there are, one of them. `client` is an MlflowClient."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from mlflow import MlflowClient

FOLDER = "artifacts/packed"  # of the packed folder among the files of the model
CANARY = "canary"  # folder among the registering run's artifacts: videos that the model is known by
CANARY_RECORD = "canary.json"  # in it
CANARY_TAG = "qvgen.canary"  # of the version: sha256 of the record
CANARY_RESULT = "canary."  # tags of the version, then a host: what came of `qvgen canary` there last, as JSON


def local_folder(location: str) -> Path | None:
    """The folder of an artifact location on this machine; None for one that a server or another store keeps."""
    parts = urlsplit(location)
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") and parts.netloc in ("", "localhost") else None


def list_files(client: MlflowClient, model_id: str, folder: str | None = None) -> Iterator[tuple[str, int]]:
    """Path and bytes of each file of a logged model, below `folder`."""
    for entry in client.list_logged_model_artifacts(model_id, folder):
        if entry.is_dir:
            yield from list_files(client, model_id, entry.path)
        else:
            yield entry.path, int(entry.file_size or 0)


def fetch_file(client: MlflowClient, location: str, name: str, folder: Path) -> Path:
    """Download the file `name` of the artifact location into `folder`; returns its path. Raises what MLflow raises."""
    from mlflow.artifacts import download_artifacts

    uri = f"{location.rstrip('/')}/{name}"
    return Path(download_artifacts(artifact_uri=uri, dst_path=str(folder), tracking_uri=client.tracking_uri))
