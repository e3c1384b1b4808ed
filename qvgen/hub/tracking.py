"""MLflow's registry as whoever uses a model reads it: where it is, and what it says of a version."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from qvgen.hub.address import without_secrets
from qvgen.hub.reference import Reference

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOOPBACK = ("127.0.0.1", "localhost", "::1")

# MLflow's own defaults wait 248 s for a server that is down. Telemetry stays off.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "DO_NOT_TRACK": "1",
}
_SHA256 = "sha256."
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow says the latter for an alias


class NotRegisteredError(ValueError):
    """The registry has no such model, version or alias."""


class UnreachableError(ValueError):
    """The registry does not answer."""


@dataclass(frozen=True)
class Registered:
    """A version as the registry has it: the sha256 of each file by its path, and where the files can be had."""

    name: str
    version: int
    files: dict[str, str]
    location: str  # of the logged model's files in MLflow
    model_id: str  # of the logged model
    uploaded: bool  # whether they hold the packed folder
    md5: str | None = None  # DVC's hash of the folder
    remote: str | None = None  # address of the DVC remote
    commit: str | None = None  # of git, that the registering run was made at
    tags: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


def spare_loopback(variables: MutableMapping[str, str]) -> None:
    """No client that reads `variables` asks a proxy for this machine's own servers: `http_proxy` is often set without
    `no_proxy`, and a proxy elsewhere cannot reach them."""
    for name in ("no_proxy", "NO_PROXY"):
        given = [host for host in variables.get(name, "").split(",") if host.strip()]
        if "*" not in given:
            variables[name] = ",".join([*given, *(host for host in LOOPBACK if host not in given)])


def find_tracking(here: Path | None = None) -> str:
    """MLFLOW_TRACKING_URI, else the embedded database of the project that `here` (the current folder) lies in. Raises
    ValueError where there is neither."""
    if given := os.environ.get("MLFLOW_TRACKING_URI"):
        return given
    here = here or Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file() and (folder / "mlflow.db").is_file():
            return f"sqlite:///{folder / 'mlflow.db'}"
    raise ValueError("where is MLflow? Set MLFLOW_TRACKING_URI to its address, such as https://mlflow.example.com")


def open_client(uri: str) -> MlflowClient:
    """A client that gives up on a silent server within seconds."""
    import logging

    spare_loopback(os.environ)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri)


def read_version(client: MlflowClient, reference: Reference) -> Registered:
    """What the registry says of a version now.

    Raises NotRegisteredError, UnreachableError, and ValueError for a version that does not have the hash of every file or has
    a path that leaves its folder.
    """
    from mlflow.exceptions import MlflowException

    try:
        number = reference.version
        if number is None:
            number = int(client.get_model_version_by_alias(reference.name, str(reference.alias)).version)
        found = client.get_model_version(reference.name, str(number))
        scheme, _, id = (found.source or "").partition(":/")
        model = client.get_logged_model(id) if scheme == "models" else None
        run: Any = client.get_run(found.run_id) if found.run_id else None
    except MlflowException as error:
        where = without_secrets(client.tracking_uri)
        if error.error_code in _ABSENT:
            raise NotRegisteredError(f"the registry at {where} has no {reference} ({str(error)[:200]})") from None
        raise UnreachableError(f"MLflow at {where} does not answer, or refuses ({error.error_code})") from error
    if model is None:
        raise ValueError(f"{reference} has source {found.source!r:.100}, not models:/m-...: stage register did not make it")
    files = {key.removeprefix(_SHA256): value for key, value in found.tags.items() if key.startswith(_SHA256)}
    for path in files:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path or not path:
            raise ValueError(f"{reference}: {path!r:.100} is not a path inside a folder")
    if "model_index.json" not in files:
        raise ValueError(
            f"the registry does not have the hash of every file of {reference} (no model_index.json): it was registered by an "
            "older version, or is no pipeline; `dvc repro --force register` makes a new one"
        )
    return Registered(
        name=reference.name,
        version=int(found.version),
        files=files,
        location=model.artifact_location,
        model_id=model.model_id,
        uploaded=found.tags.get("qvgen.upload") == "copy",
        md5=found.tags.get("dvc.md5"),
        remote=found.tags.get("dvc.remote"),
        commit=run.data.tags.get("git.commit") if run is not None else None,
        tags=dict(found.tags),
    )
