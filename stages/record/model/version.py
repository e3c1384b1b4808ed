"""MLflow's model registry: the version that stage register wishes for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from qvgen.hub.promotions import move_alias
from stages.record.journal import now
from stages.record.model.upload import upload_files

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

IDENTITY = "qvgen.fingerprint"  # tag: hash of the packed bytes and their metrics
UPLOAD = "qvgen.upload"  # tag: copy, the files are in MLflow; link, they are not
FLAVOUR = "flavour."  # tags: sha256 of the files by which MLflow loads the model
MODEL_TYPE = "qvgen-packed"


def register_version(
    client: MlflowClient, experiment: str, run_id: str, wish: dict[str, Any], alone: Callable[[], AbstractContextManager[None]]
) -> ModelVersion:
    """What a journal entry "register" asks for: the version of exactly this model, created if there is none, with the alias
    set and recorded. A version is there only when all its files are; an upload that was cut short is gone on with.

    The sender calls it; `alone` is its lock, which the upload of gigabytes does not hold. Raises what MLflow raises, and
    FileNotFoundError if a file to upload is nowhere any more.
    """
    with alone():
        version = _known(client, wish)
        copied = version is None and wish.get("upload") == "copy"
        draft = _draft(client, experiment, run_id, wish) if copied else None
    if draft is not None:
        upload_files(client, draft, wish)
    with alone():
        version = version or _known(client, wish) or _create(client, experiment, run_id, wish, draft)
        move_alias(client, wish["name"], wish["alias"], int(version.version), reason=f"registered by run {version.run_id}")
        return version


def _known(client: MlflowClient, wish: dict[str, Any]) -> ModelVersion | None:
    query = f"name = '{wish['name']}' and tags.`{IDENTITY}` = '{wish['identity']}'"
    return next(iter(client.search_model_versions(query, max_results=1)), None)


def _draft(client: MlflowClient, experiment: str, run_id: str, wish: dict[str, Any]) -> LoggedModel:
    """The logged model that this run began and did not finish, else a new one."""
    for model in client.search_logged_models([experiment], f"tags.`{IDENTITY}` = '{wish['identity']}'"):
        if model.source_run_id == run_id:
            return model
    return client.create_logged_model(
        experiment, wish["name"], run_id, wish["tags"] | {IDENTITY: wish["identity"]}, wish["params"], MODEL_TYPE
    )


def _create(
    client: MlflowClient, experiment: str, run_id: str, wish: dict[str, Any], draft: LoggedModel | None
) -> ModelVersion:
    import mlflow
    from mlflow.entities import LoggedModelOutput, Metric

    mlflow.set_tracking_uri(client.tracking_uri)
    tags = wish["tags"] | {IDENTITY: wish["identity"]}
    model = draft or mlflow.create_external_model(  # "external": MLflow knows of it, the weights stay in DVC
        name=wish["name"],
        source_run_id=run_id,
        tags=tags,
        params=wish["params"],
        model_type=MODEL_TYPE,
        experiment_id=experiment,
    )
    if draft is not None:
        client.finalize_logged_model(model.model_id, "READY")
    outputs = client.get_run(run_id).outputs
    if model.model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    points = [Metric(key, value, now(), 0, model_id=model.model_id) for key, value in wish["metrics"].items()]
    client.log_batch(run_id, metrics=points)
    version = mlflow.register_model(model.model_uri, wish["name"], tags=tags)
    if description := wish.get("description"):
        text = description.replace("{version}", str(version.version))
        client.update_model_version(wish["name"], version.version, text)
    return version
