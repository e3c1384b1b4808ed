"""The check of `qvgen audit` on what MLflow has of a packed model: each file, hashed again, is the registered one, and so
are the files by which MLflow loads it: they name the code that runs then."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.audit.blobs import file_hash
from pipelines.audit.checks import SHA256, Check, verdict
from pipelines.audit.lineage import Lineage
from qvgen.hub.artifacts import CANARY_RESULT, FOLDER, fetch_file, list_files, local_folder
from stages.record.model.version import FLAVOUR, UPLOAD

if TYPE_CHECKING:
    from mlflow import MlflowClient

NAME = "uploaded"
_FIX = "do not load it from MLflow: delete the version there, then `dvc repro --force register` uploads the files anew"


def uploaded_check(client: MlflowClient, lineage: Lineage) -> Check:
    """Every file among the version's artifacts has the hash that was registered; none is missing, none was added."""
    from mlflow.exceptions import MlflowException

    tags, model = lineage.version.tags, lineage.model
    if tags.get(UPLOAD) != "copy":
        why = "its files stay in DVC (register.upload: link)" if UPLOAD in tags else "it was registered without its files"
        return Check(NAME, "PASS", f"nothing to check in MLflow: {why}")
    if model is None:
        return Check(NAME, "FAIL", "the logged model that had the files is deleted; see logged model")
    wanted = {f"{FOLDER}/{key.removeprefix(SHA256)}": value for key, value in tags.items() if key.startswith(SHA256)}
    wanted |= {key.removeprefix(FLAVOUR): value for key, value in tags.items() if key.startswith(FLAVOUR)}
    try:
        found = _hashes(client, model.model_id, model.artifact_location)
    except (MlflowException, OSError) as error:
        return Check(NAME, "FAIL", f"MLflow cannot give its files ({type(error).__name__}: {str(error)[:120]}); {_FIX}")
    swapped = {value: name for name, value in wanted.items()}
    faults = [f"{name} is missing in MLflow" for name in wanted if name not in found]
    for name, value in found.items():
        if name not in wanted:
            faults.append(f"{name} in MLflow is not part of the model")
        elif wanted[name] != value:
            other = swapped.get(value)
            faults.append(f"{name} in MLflow is {'the file ' + other if other else 'not what was registered'}")
    return verdict(NAME, faults, f"{len(wanted)} files in MLflow as registered", _FIX)


def _hashes(client: MlflowClient, model_id: str, location: str) -> dict[str, str]:
    """Path -> sha256 of every file of the model, where they lie, else downloaded one at a time."""
    place = local_folder(location)
    if place is not None and place.is_dir():
        files = [path for path in sorted(place.rglob("*")) if path.is_file()]
        return {path.relative_to(place).as_posix(): file_hash(path, "sha256") for path in files}
    found: dict[str, str] = {}
    for name, _ in list_files(client, model_id):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = file_hash(fetch_file(client, location, name, Path(folder)), "sha256")
    return found


def canary_check(lineage: Lineage) -> Check:
    """What hosts that serve the version found when they made its registered videos again."""
    faults, said = [], []
    for key, value in sorted(lineage.version.tags.items()):
        if key.startswith(CANARY_RESULT):
            host = key.removeprefix(CANARY_RESULT)
            try:
                result = json.loads(value)
                line = f"{host} {result['time']} {result['says']}"
                good = result["ok"] is True
            except (ValueError, KeyError, TypeError):
                line, good = f"{host}: {value!r:.100} is no result", False
            (said if good else faults).append(line)
    told = "; ".join(said) or "nobody has asked yet: `qvgen canary` where it serves"
    return verdict("canary", faults, told, "do not serve it there: compare hardware and packages")
