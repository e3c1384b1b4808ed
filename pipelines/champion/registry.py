"""MLflow's model registry as `qvgen promote` and `qvgen audit` read it, with errors that a person can act on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stages.record.connection import connect, public_uri, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow says the latter for an alias


SECONDS = 120.0  # that MLflow's server may take, in all ...
READING_SECONDS = 900.0  # ... and for a whole audit, which reads every curve and every artifact


class NotRegisteredError(ValueError):
    """The registry has no such model, version or alias."""


class _TooLateError(BaseException):
    """No Exception: MLflow's client would take it for an answer of the server, and ask again."""


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """End the block after that time, in all: each read of a server that sends a byte a second is in time. Only the main thread
    can be interrupted; others have a deadline of their own (promote_after_run)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def too_late(number: int, frame: object) -> None:
        raise _TooLateError

    before = signal.signal(signal.SIGALRM, too_late)
    remaining, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def open_registry(home: Path, *, reading: bool = False) -> Iterator[MlflowClient]:
    """A client of the tracking server, or of the embedded database of `home`. What MLflow raises becomes a ValueError that
    shows no password."""
    from mlflow.exceptions import MlflowException

    try:
        with _within(READING_SECONDS if reading else SECONDS):
            yield connect(home, reading=reading)[0]
    except _TooLateError:
        where = public_uri(tracking_uri(home), home)
        raise ValueError(f"MLflow at {where} is too slow: not all was said in time; ask who runs the server") from None
    except MlflowException as error:
        where = public_uri(tracking_uri(home), home)
        raise ValueError(
            f"MLflow at {where} does not answer, or refuses ({error.error_code}); "
            "start its server, or see MLFLOW_TRACKING_URI; QVGEN_DEBUG=1 shows the cause"
        ) from error


def find_model(client: MlflowClient, name: str) -> RegisteredModel:
    """Raises NotRegisteredError."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code not in _ABSENT:
            raise
        known = ", ".join(model.name for model in client.search_registered_models()) or "none"
        message = f"the registry has no model {name!r} (it has: {known}); `dvc repro register` makes one"
        raise NotRegisteredError(message) from None


def find_version(client: MlflowClient, name: str, version: int | None, alias: str = "") -> ModelVersion:
    """The version of that number, or if it is None the one that `alias` names. Raises NotRegisteredError."""
    from mlflow.exceptions import MlflowException

    model = find_model(client, name)
    wanted = model.aliases.get(alias) if version is None else version
    if wanted is None:
        known = ", ".join(sorted(model.aliases)) or "none"
        raise NotRegisteredError(f"{name} has no alias {alias} (it has: {known}); `dvc repro register` sets challenger")
    try:
        return client.get_model_version(name, str(wanted))
    except MlflowException as error:
        if error.error_code not in _ABSENT:
            raise
        numbers = sorted(int(found.version) for found in client.search_model_versions(f"name = '{name}'"))
        known = ", ".join(map(str, numbers)) or "none"
        raise NotRegisteredError(f"{name} has no version {wanted} (it has: {known})") from None


def logged_model_id(version: ModelVersion) -> str:
    """From the version's source, models:/<id>: MLflow leaves `model_id` empty in a database. Raises ValueError."""
    scheme, _, id = (version.source or "").partition(":/")
    if scheme != "models" or not id.startswith("m-"):
        raise ValueError(f"{version.name} version {version.version} has source {version.source!r}, not models:/m-...")
    return id


def metrics_of(client: MlflowClient, version: ModelVersion) -> dict[str, float]:
    """Metrics of a version's logged model, by dotted name. Raises ValueError if it has no logged model."""
    metrics = client.get_logged_model(logged_model_id(version)).metrics or []
    return {metric.key: metric.value for metric in metrics}
