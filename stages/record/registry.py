"""MLflow's model registry: the version that stage register wishes for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.record.journal import now
from stages.record.promotions import move_alias

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

IDENTITY = "qvgen.fingerprint"  # tag: hash of the packed bytes and their metrics


def register_version(client: MlflowClient, experiment: str, run_id: str, wish: dict[str, Any]) -> ModelVersion:
    """What a journal entry "register" asks for: the version of exactly this model, created if there is
    none, with the alias set and recorded. The sender calls it, under a lock. Raises what MLflow raises.
    """
    name, identity = wish["name"], wish["identity"]
    known = client.search_model_versions(f"name = '{name}' and tags.`{IDENTITY}` = '{identity}'", max_results=1)
    version = known[0] if known else _create(client, experiment, run_id, wish)
    move_alias(client, name, wish["alias"], int(version.version), reason=f"registered by run {version.run_id}")
    return version


def _create(client: MlflowClient, experiment: str, run_id: str, wish: dict[str, Any]) -> ModelVersion:
    import mlflow
    from mlflow.entities import LoggedModelOutput, Metric

    mlflow.set_tracking_uri(client.tracking_uri)
    tags = wish["tags"] | {IDENTITY: wish["identity"]}
    model = mlflow.create_external_model(  # "external": MLflow knows of it, the weights stay in DVC
        name=wish["name"],
        source_run_id=run_id,
        tags=tags,
        params=wish["params"],
        model_type="qvgen-packed",
        experiment_id=experiment,
    )
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    points = [Metric(key, value, now(), 0, model_id=model.model_id) for key, value in wish["metrics"].items()]
    client.log_batch(run_id, metrics=points)
    return mlflow.register_model(model.model_uri, wish["name"], tags=tags)
