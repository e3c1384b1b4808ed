"""Stage register: the packed model as a version in MLflow's model registry, under the alias "challenger".

Reads artifacts/packed, metrics/evaluate.json and metrics/benchmark.json; writes metrics/register.json. The weights stay
in DVC: the version carries their hashes. The same bytes with the same metrics are one version, however often this runs.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from stages.record.journal import read_receipt
from stages.runtime.dvc import fingerprint
from stages.runtime.run import Stage, stage_main

PACKED = "artifacts/packed"
MEASURED = ("metrics/evaluate.json", "metrics/benchmark.json")
ALIAS = "challenger"


def run(stage: Stage) -> None:
    wish = describe(stage)
    stage.log_metrics(wish["metrics"])
    stage.journal.write("register", **wish)  # the sender does it, now or whenever tracking can be reached again
    entry = stage.journal.wait_for("registered") or {"name": wish["name"], "version": None, "run_id": None}
    entry["tracking_uri"] = read_receipt(stage.journal.path).get("tracking_uri")
    if entry["version"] is None:
        print(f"warning: the model is not registered yet; the wish is in {stage.journal.path}", file=sys.stderr)
    with stage.outputs("metrics/register.json") as path:
        path.write_text(json.dumps(entry, indent=2) + "\n")


def describe(stage: Stage) -> dict[str, Any]:
    """The entry for the registry: name, alias, identity, tags (hashes), parameters and metrics.

    Raises ValueError if the packed transformer's config.json does not say how it is quantized.
    """
    from qvgen.models.hashes import hash_files
    from qvgen.packing.config import from_config

    transformer = stage.root / PACKED / "transformer"
    config = json.loads((transformer / "config.json").read_text()).get("quantization_config")
    if config is None:
        raise ValueError(f"{transformer / 'config.json'} has no quantization_config: run stage pack again")
    scheme, layers = from_config(config)
    weights = hash_files(transformer, sorted(file.name for file in transformer.glob("*.safetensors")))
    tags = {f"sha256.transformer/{name}": record.sha256 for name, record in weights.items()}
    tags |= {"dvc.path": PACKED, "dvc.md5": stage.facts.deps[PACKED], "dvc.stage": stage.facts.address}
    identity = fingerprint([stage.facts.deps[path] for path in (PACKED, *MEASURED)])
    metrics: dict[str, float] = {}
    for path in MEASURED:
        numbers, texts = leaves(json.loads((stage.root / path).read_text()))
        metrics |= numbers
        tags |= texts
    params = {"quantization": scheme.name, "layers": str(layers), "format_version": str(config["format_version"])}
    return {
        "name": stage.params.register_.name,
        "alias": ALIAS,
        "identity": identity,
        "tags": tags,
        "params": params,
        "metrics": metrics,
    }


def leaves(tree: dict[str, Any], prefix: str = "") -> tuple[dict[str, float], dict[str, str]]:
    """Numbers and texts of a metrics file, by dotted name; lists and nulls are left out."""
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            inner_numbers, inner_texts = leaves(value, f"{prefix}{key}.")
            numbers |= inner_numbers
            texts |= inner_texts
        elif isinstance(value, int | float):
            numbers[prefix + key] = float(value)
        elif isinstance(value, str):
            texts[prefix + key] = value
    return numbers, texts


if __name__ == "__main__":
    stage_main("register", run)
