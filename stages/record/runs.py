"""Additions to a run in MLflow that its stage did not report: datasets, the run that produced cached outputs, texts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

CACHED = "cached"  # value of the tag stage.state of a stage that was up to date
DATA = "artifacts/"  # dependencies below are data or models; the others are code
_DEP, _OUT = "dvc.dep.", "dvc.out."


def log_datasets(client: MlflowClient, run: str, tags: dict[str, str]) -> None:
    """The run's data dependencies as MLflow datasets; the digest is DVC's hash, so equal data is equal in MLflow."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    found = {key.removeprefix(_DEP): value for key, value in tags.items() if key.startswith(_DEP + DATA)}
    inputs = [
        DatasetInput(
            Dataset(path, digest, "dvc", json.dumps({"path": path, "md5": digest, "rev": tags.get("git.commit")})),
            [InputTag("mlflow.data.context", "input")],
        )
        for path, digest in found.items()
    ]
    if inputs:
        client.log_inputs(run, inputs)


def find_producer(client: MlflowClient, experiment: str, tags: dict[str, str]) -> str | None:
    """The newest finished run of the same stage key whose outputs have the same hashes: what a cached stage's outputs come
    from. None if MLflow has none, such as in a fresh clone."""
    wanted = {key: value for key, value in tags.items() if key.startswith(_OUT)}
    query = f"tags.`dvc.key` = '{tags['dvc.key']}' and attributes.status = 'FINISHED'"
    for run in client.search_runs([experiment], query, order_by=["attributes.start_time DESC"]):
        found: dict[str, Any] = run.data.tags
        if found.get("stage.state") != CACHED and all(found.get(key) == value for key, value in wanted.items()):
            return run.info.run_id
    return None


def log_texts_once(client: MlflowClient, run: str, texts: dict[str, str]) -> None:
    """Texts as artifacts; a tag says when all are there, so that a crash in between loses none."""
    if not texts or "texts.logged" in client.get_run(run).data.tags:
        return
    for name, text in texts.items():
        client.log_text(run, text, name)
    client.set_tag(run, "texts.logged", "true")
