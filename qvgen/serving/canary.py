"""`qvgen canary`: is what serves here what was registered? The registered videos made again on this host, and compared."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from qvgen.evaluation.quality.canary import Outcome, check_canary
from qvgen.hub.artifacts import CANARY, CANARY_RECORD, CANARY_RESULT, CANARY_TAG
from qvgen.hub.reference import Reference, parse_reference
from qvgen.hub.resolve import fetch
from qvgen.hub.tracking import UnreachableError, find_tracking, open_client, read_version


@dataclass(frozen=True)
class Result:
    """A comparison on this host."""

    model: str
    host: str
    time: str  # UTC, ISO 8601
    outcome: Outcome


def run_canary(reference: Reference, on_video: Callable[[int], object] = lambda count: None) -> Result:
    """Compare, and log the result to the version. Raises ValueError if the version has no videos to compare with, or they are
    not the registered ones, and for files that cannot be had."""
    from mlflow.exceptions import MlflowException

    client = open_client(find_tracking())
    model = read_version(client, reference)
    version = client.get_model_version(model.name, str(model.version))
    if CANARY_TAG not in model.tags or not version.run_id:
        raise ValueError(f"{model} was registered without videos to compare with: `dvc repro` makes and registers some")
    with tempfile.TemporaryDirectory() as temporary:
        try:
            known = Path(client.download_artifacts(version.run_id, CANARY, temporary))
        except (MlflowException, OSError) as error:
            raise UnreachableError(f"the videos of {model} cannot be had from MLflow ({str(error)[:200]})") from None
        record = known / CANARY_RECORD
        if not record.is_file() or hashlib.sha256(record.read_bytes()).hexdigest() != model.tags[CANARY_TAG]:
            raise ValueError(f"{CANARY_RECORD} of {model} in MLflow is not what was registered: nothing to compare with")
        out = Path(temporary) / "made"
        out.mkdir()
        outcome = check_canary(fetch(model), known, out, on_video)
    done = Result(f"{model.name}/{model.version}", platform.node(), f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", outcome)
    worst = outcome.worst_psnr_db if math.isfinite(outcome.worst_psnr_db) else None  # JSON has no infinity
    text = json.dumps(asdict(outcome) | {"time": done.time, "says": str(outcome), "worst_psnr_db": worst})
    client.set_model_version_tag(model.name, str(model.version), f"{CANARY_RESULT}{done.host}", text)
    return done


def canary(text: str, on_video: Callable[[int], object] = lambda count: None) -> Result:
    """`run_canary` of a reference such as models:/qvgen@champion."""
    return run_canary(parse_reference(text), on_video)
