"""An audited record as provenance that other programs read: an in-toto Statement v1 whose predicate is SLSA provenance v1.

https://in-toto.io/Statement/v1 and https://slsa.dev/spec/v1.0/provenance. It is not signed: sign the file with what your
verifier takes (`cosign attest-blob`, `ssh-keygen -Y sign`). It claims no SLSA level: who runs the pipeline can change it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pipelines.audit.checks import CODE, SHA256
from pipelines.audit.lineage import Lineage, Step
from pipelines.audit.project import Project
from stages.record.secrets import without_secrets

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD = "urn:qvgen:dvc-repro:v1"  # what externalParameters mean: recorded parameters of the stages, by their names
BUILDER = "urn:qvgen:checkout"  # whoever runs `dvc repro`; a run on a shared server is no other builder


def statement(lineage: Lineage, project: Project) -> dict[str, Any]:
    """As JSON. Subjects: the files of the packed model, by sha256. Raises ValueError for a version that names no files, or
    whose runs are not in MLflow."""
    packed, _ = lineage.packed
    hashes = {key.removeprefix(SHA256): value for key, value in lineage.version.tags.items() if key.startswith(SHA256)}
    source = lineage.source
    if not hashes or source is None:
        raise ValueError(f"version {lineage.version.version} names no files by sha256, or no run: see the audit")
    params = {name: value for step in lineage.steps for name, value in step.params.items() if not name.startswith(CODE)}
    machine = {name: value for name, value in source.tags.items() if name.startswith("machine.")}
    return {
        "_type": STATEMENT,
        "subject": [{"name": f"{packed}/{name}", "digest": {"sha256": value}} for name, value in sorted(hashes.items())],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD,
                "externalParameters": {"model": lineage.version.name, "parameters": dict(sorted(params.items()))},
                "internalParameters": {"stages": [step.stage for step in reversed(lineage.steps)], **machine},
                "resolvedDependencies": [*_sources(lineage, project), *_data(lineage)],
            },
            "runDetails": {
                "builder": {"id": BUILDER},
                "metadata": {
                    "invocationId": f"mlflow-run:{source.id}",
                    "startedOn": _time(min(step.started for step in lineage.steps)),
                    "finishedOn": _time(source.ended),
                },
                "byproducts": [_byproduct(step, path, value) for step in lineage.steps for path, value in step.outs.items()],
            },
        },
    }


def _sources(lineage: Lineage, project: Project) -> list[dict[str, Any]]:
    remote = without_secrets(project.git("remote", "get-url", "origin") or "")
    uri = {"uri": f"git+{remote}"} if "://" in remote else {}
    return [{"name": "source", **uri, "digest": {"gitCommit": commit}} for commit in lineage.commits]


def _data(lineage: Lineage) -> list[dict[str, Any]]:
    """What no stage made: data, configuration."""
    found = {path: step.deps[path] for step, path in lineage.orphans}
    return [{"name": path, "digest": _digest(md5)} for path, md5 in sorted(found.items())]


def _byproduct(step: Step, path: str, md5: str) -> dict[str, Any]:
    return {"name": path, "digest": _digest(md5), "annotations": {"stage": step.stage, "mlflowRun": step.id}}


def _digest(md5: str) -> dict[str, str]:
    """DVC's hash of a folder is the md5 of its list of files."""
    return {"dvcDirMd5": md5.removesuffix(".dir")} if md5.endswith(".dir") else {"md5": md5}


def _time(milliseconds: int) -> str:
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"
