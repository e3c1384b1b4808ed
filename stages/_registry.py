"""Model versions in MLflow's registry, asked for by a journal entry "register"."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages._journal import now

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

IDENTITY = "qvgen.fingerprint"  # tag: hash of the packed bytes and their metrics


def register_version(client: MlflowClient, experiment: str, run_id: str, wish: dict[str, Any]) -> ModelVersion:
    """The version of exactly this model, created if there is none, with the alias set. Raises what MLflow raises.

    `wish` has name, alias, identity, tags, params and metrics. Call it under a lock: two callers would both create.
    """
    name, identity = wish["name"], wish["identity"]
    known = client.search_model_versions(f"name = '{name}' and tags.`{IDENTITY}` = '{identity}'", max_results=1)
    version = known[0] if known else _create(client, experiment, run_id, wish)
    client.set_registered_model_alias(name, wish["alias"], version.version)
    return version


def _create(client: MlflowClient, experiment: str, run_id: str, wish: dict[str, Any]) -> ModelVersion:
    import mlflow
    from mlflow.entities import LoggedModelOutput, Metric

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
