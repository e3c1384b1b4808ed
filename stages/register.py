"""Stage register: the packed model as a version in MLflow's model registry, under the alias "challenger".

Reads artifacts/packed, artifacts/evaluation/canary, metrics/evaluate.json and metrics/benchmark.json; writes
metrics/register.json. The version carries the hash of every file, and up to 2 GB (`register.upload`) MLflow gets the files
too; larger ones stay in DVC, and the version says how to get them. The same bytes with the same metrics are one version,
however often this runs.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from qvgen.hub.artifacts import CANARY_RECORD, CANARY_TAG
from stages.record.journal import FINISH_SECONDS, read_receipt
from stages.record.model.flavour import flavour_of
from stages.record.model.upload import SLOWEST
from stages.record.model.version import FLAVOUR, UPLOAD
from stages.record.secrets import without_secrets
from stages.runtime.dvc import Stores, fingerprint, read_stores
from stages.runtime.run import Stage, stage_main

PACKED = "artifacts/packed"
MEASURED = ("metrics/evaluate.json", "metrics/benchmark.json")
CANARY = "artifacts/evaluation/canary"
ALIAS = "challenger"
PROMPTS = {"digits": "a red digit three moving up and left", "videos": "a cat walks through grass"}  # by prepare.source
LARGEST_COPY = 2_000_000_000  # bytes of a packed folder that `upload: auto` still copies


def run(stage: Stage) -> None:
    wish = describe(stage)
    stage.log_metrics(wish["metrics"])
    if (stage.root / CANARY).is_dir():
        stage.log_artifact(CANARY)
    stage.journal.write("register", **wish)  # the sender does it, now or whenever tracking can be reached again
    patience = FINISH_SECONDS + (wish["bytes"] / SLOWEST if wish["upload"] == "copy" else 0)
    entry = stage.journal.wait_for("registered", patience) or {"name": wish["name"], "version": None, "run_id": None}
    entry["tracking_uri"] = read_receipt(stage.journal.path).get("tracking_uri")
    if entry["version"] is None:
        print(f"warning: the model is not registered yet; the wish is in {stage.journal.path}", file=sys.stderr)
    with stage.outputs("metrics/register.json") as path:
        path.write_text(json.dumps(entry, indent=2) + "\n")


def describe(stage: Stage) -> dict[str, Any]:
    """The entry for the registry: name, alias, identity, tags (hashes), parameters, metrics; and the files, with where they
    can be had.

    Raises ValueError if the packed transformer's config.json does not say how it is quantized.
    """
    from qvgen.models.files import quantizations
    from qvgen.packing.config import from_config

    folder, stores = stage.root / PACKED, read_stores(stage.root)
    given = quantizations(folder)
    if not given:
        raise ValueError(f"{folder / 'transformer' / 'config.json'} has no quantization_config: run stage pack again")
    schemes, layers = zip(*map(from_config, given), strict=True)  # of one transformer, or of each of two that is packed
    files = {path.relative_to(folder).as_posix(): _record(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    total = sum(record["bytes"] for record in files.values())
    upload = stage.params.register_.upload
    if upload == "auto":
        upload = "copy" if total <= LARGEST_COPY else "link"
    tags = {f"sha256.{name}": record["sha256"] for name, record in files.items()}
    tags |= {"dvc.path": PACKED, "dvc.md5": stage.facts.deps[PACKED], "dvc.stage": stage.facts.address, UPLOAD: upload}
    flavour: dict[str, str] = {}
    if upload == "copy" and (folder / "model_index.json").is_file():
        prompt = PROMPTS[stage.params.prepare.source]
        hashes = {name: record["sha256"] for name, record in files.items()}
        flavour = flavour_of(folder, stage.params.register_.name, hashes, stage.root, prompt)
        tags |= {f"{FLAVOUR}{name}": hashlib.sha256(text.encode()).hexdigest() for name, text in flavour.items()}
    if (stage.root / CANARY / CANARY_RECORD).is_file():
        tags[CANARY_TAG] = hashlib.sha256((stage.root / CANARY / CANARY_RECORD).read_bytes()).hexdigest()
    if stores.remote:
        tags["dvc.remote"] = without_secrets(stores.remote)
    identity = fingerprint([stage.facts.deps[path] for path in (PACKED, *MEASURED)])
    metrics: dict[str, float] = {}
    for path in MEASURED:
        numbers, texts = leaves(json.loads((stage.root / path).read_text()))
        metrics |= numbers
        tags |= texts
    names = " and ".join(dict.fromkeys(scheme.name for scheme in schemes))
    params = {"quantization": names, "layers": str(sum(layers)), "format_version": str(given[0]["format_version"])}
    return {
        "name": stage.params.register_.name,
        "alias": ALIAS,
        "identity": identity,
        "tags": tags,
        "params": params,
        "metrics": metrics,
        "upload": upload,
        "bytes": total,
        "files": files,
        "texts": flavour,
        "folder": str(folder),
        "cache": stores.cache,
        "description": _how_to_get(stage, stores, upload, total),
    }


def _record(path: Path) -> dict[str, Any]:
    """sha256, md5 (DVC's name of the bytes) and size of a file, read once."""
    sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            sha256.update(piece)
            md5.update(piece)
            size += len(piece)
    return {"sha256": sha256.hexdigest(), "md5": md5.hexdigest(), "bytes": size}


def _how_to_get(stage: Stage, stores: Stores, upload: str, total: int) -> str:
    """Description of the version, for whoever finds it in MLflow. {version} stands for its number."""
    name = stage.params.register_.name
    pull = f"`qvgen pull models:/{name}/{{version}} --out DIR`"
    if upload == "copy":
        return f"The {total / 1e6:.1f} MB of the packed model are among the files of this version: {pull}."
    commit = stage.journal.start_tags().get("git.commit", "COMMIT")
    where = f"the DVC remote {without_secrets(stores.remote)}" if stores.remote else "DVC's cache where it was made"
    return (
        f"The {total / 1e6:.1f} MB of the packed model are not in MLflow (register.upload: link) but in {where}: {pull}, or "
        f"in a clone `git checkout {commit} && dvc pull {PACKED}`."
    )


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
