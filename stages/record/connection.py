"""Where MLflow is, and a client of it: a server, or the embedded database of this checkout."""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from qvgen.hub.tracking import DEFAULTS, LOOPBACK, spare_loopback
from stages.record.secrets import without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["EXPERIMENT", "KIND", "LOOPBACK", "connect", "locked", "public_uri", "spare_loopback", "tracking_uri"]

EXPERIMENT = "qvgen"
# The page that MLflow opens an experiment on: runs, metrics and models, instead of evaluations of language models.
KIND = ("mlflow.experimentKind", "custom_model_development")

# Where MLflow keeps whole paths of files.
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


def tracking_uri(home: Path) -> str:
    """MLFLOW_TRACKING_URI, else the embedded database of this checkout."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.resolve() / 'mlflow.db'}"


def public_uri(uri: str, home: Path) -> str:
    """The same address without password, and without the folder of this checkout, fit for a tracked file."""
    return without_secrets(uri.partition("?")[0].replace(f"sqlite:///{home.resolve()}/", "sqlite:///"))


def connect(home: Path, *, reading: bool = False) -> tuple[MlflowClient, str]:
    """A client and the id of the experiment, both created on first use. Raises what MLflow raises, and ValueError for an
    embedded database that cannot be written, unless the caller is only `reading`: then it is read from a copy."""
    spare_loopback(os.environ)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri(home)
    if "?" in str(home.resolve()) and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ValueError(f"a ? in {home.resolve()} ends MLflow's address: rename the folder, or set MLFLOW_TRACKING_URI")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    with locked(home):  # four stages that start at once must not each create database and experiment
        database = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
        if database is not None and not writable(database):
            if not (reading and database.exists()):
                raise ValueError(f"{database} cannot be written: use a checkout of your own, or set MLFLOW_TRACKING_URI")
            mlruns = database.resolve().parent / "mlruns"
            database = _copy(database)
            uri = f"sqlite:///{database}"
            relocate(database, mlruns)
        elif database is not None and database.exists():
            if moved := relocate(database, database.resolve().parent / "mlruns"):
                print(f"{database} was made in another folder: {moved} addresses of files now name this one", file=sys.stderr)
        elif database is not None:
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


def writable(file: Path) -> bool:
    """Whether a file, and what lies beside it, can be written or made: sqlite needs both."""
    return os.access(file.parent, os.W_OK) and (not file.exists() or os.access(file, os.W_OK))


def _copy(database: Path) -> Path:
    """Of a database that cannot be written, which MLflow wants to, for the life of this process."""
    folder = Path(tempfile.mkdtemp(prefix="qvgen-mlflow-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    to = folder / database.name
    source = sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)
    with closing(source), closing(sqlite3.connect(to)) as copy:
        source.backup(copy)
    return to


def relocate(database: Path, mlruns: Path) -> int:
    """Let the embedded database name the files in `mlruns`, and return how many addresses were of another folder.

    MLflow keeps whole paths, so a checkout that was copied or moved would write into the one that it was copied from. Without
    a folder `mlruns` only what is new goes there: the files of old runs are where they were.
    """
    changed = 0
    with closing(sqlite3.connect(database, timeout=60)) as tables, tables:
        try:
            query = "SELECT artifact_location FROM experiments WHERE name = ?"
            (location,) = tables.execute(query, (EXPERIMENT,)).fetchone() or ("",)
        except sqlite3.OperationalError:  # no tables yet
            return 0
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{database} is damaged ({error}): put a copy of it back, or begin anew without it") from None
        old = unquote(urlsplit(location).path)
        if not location.startswith("file:") or not old.endswith("/mlruns") or Path(old) == mlruns:
            return 0
        for table, column in PLACES if mlruns.is_dir() else PLACES[:1]:
            for was, now in ((location, mlruns.as_uri()), (old, str(mlruns))):
                inside = f"{column} = ? OR substr({column}, 1, ?) = ?"
                query = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {inside}"  # names, not values
                changed += tables.execute(query, (now, len(was) + 1, was, len(was) + 1, f"{was}/")).rowcount
    return changed


def _create_database(database: Path) -> None:
    """Create the tables beside their place, so that a crash half-way leaves no half-made database."""
    from mlflow import MlflowClient

    draft = database.with_suffix(".new")
    draft.unlink(missing_ok=True)
    MlflowClient(f"sqlite:///{draft}").search_experiments(max_results=1)
    draft.replace(database)


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """A lock that one process of this checkout can hold at a time. Where nobody can write there is none."""
    folder = home / ".qvgen" / "locks"
    nearest = next(place for place in (folder, folder.parent, home) if place.exists())
    if not os.access(nearest, os.W_OK):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tracking").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
