"""Where MLflow is, and a client of it: a server, or the embedded database of this checkout."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qvgen.hub.tracking import DEFAULTS, LOOPBACK, spare_loopback
from stages.record.secrets import without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["EXPERIMENT", "KIND", "LOOPBACK", "connect", "locked", "public_uri", "spare_loopback", "tracking_uri"]

EXPERIMENT = "qvgen"
# The page that MLflow opens an experiment on: runs, metrics and models, instead of evaluations of language models.
KIND = ("mlflow.experimentKind", "custom_model_development")


def tracking_uri(home: Path) -> str:
    """MLFLOW_TRACKING_URI, else the embedded database of this checkout."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.resolve() / 'mlflow.db'}"


def public_uri(uri: str, home: Path) -> str:
    """The same address without password, and without the folder of this checkout, fit for a tracked file."""
    return without_secrets(uri.partition("?")[0].replace(f"sqlite:///{home.resolve()}/", "sqlite:///"))


def connect(home: Path) -> tuple[MlflowClient, str]:
    """A client and the id of the experiment, both created on first use. Raises what MLflow raises."""
    spare_loopback(os.environ)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri(home)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    with locked(home):  # four stages that start at once must not each create database and experiment
        database = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
        if database is not None and not database.exists():
            _create_database(database)
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is not None:
            if KIND[0] not in experiment.tags:  # made by an earlier version, or by another program
                client.set_experiment_tag(experiment.experiment_id, *KIND)
            return client, experiment.experiment_id
        # MLflow would put artifacts under the current folder, which `dvc exp run --temp` deletes.
        location = (database.resolve().parent / "mlruns").as_uri() if database is not None else None
        try:
            return client, client.create_experiment(EXPERIMENT, artifact_location=location, tags=dict([KIND]))
        except MlflowException:
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                raise
            return client, experiment.experiment_id  # another host was first


def _create_database(database: Path) -> None:
    """Create the tables beside their place, so that a crash half-way leaves no half-made database."""
    from mlflow import MlflowClient

    draft = database.with_suffix(".new")
    draft.unlink(missing_ok=True)
    MlflowClient(f"sqlite:///{draft}").search_experiments(max_results=1)
    draft.replace(database)


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """A lock that one process of this checkout can hold at a time."""
    folder = home / ".qvgen" / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tracking").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
