"""Stage compare: run the cases whose results are missing or stale, choosing learning rates in between.

`qvgen compare` starts it, and so does `dvc repro comparison/dvc.yaml:compare`. Each case has a file of its own and is skipped
if that file was made from what is wanted now, so that an interrupted comparison goes on where it stopped. QVGEN_JOBS cases
run at a time (1). Each reports a run of its own beside that of the stage.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from comparison.cases import (
    FULL_PRECISION,
    RATES,
    RESULTS,
    Case,
    case_params,
    fast_cases,
    read_factor,
    read_settings,
    reference_params,
    scored_cases,
    tuning_cases,
)
from comparison.fingerprint import read_fingerprints
from comparison.processes import run_all
from comparison.reference import is_stale, measure_reference
from comparison.store import differences, origin, read_result
from comparison.tuning import choose_rates
from qvgen.params import Params
from stages.record.execution import open_execution
from stages.runtime.dvc import DvcFacts, fingerprint
from stages.runtime.run import Stage, recorded, stage_main

LOGS = Path(".qvgen/logs")
DATA = ("artifacts/model", "artifacts/data")
OF_THE_REFERENCE = ("seed", "evaluate.")  # parameters that the full-precision model's answers depend on


def run(stage: Stage, fast: bool = False) -> None:
    """Raises ValueError, when all others are done, if a case failed or could not run."""
    settings, jobs = read_settings(stage.root), int(os.environ.get("QVGEN_JOBS", "1"))
    execution = open_execution(stage.root, stage.home).id.removeprefix("pipeline-")
    os.environ["QVGEN_EXECUTION"] = execution  # the parent of all cases
    failed = []
    if not fast:
        cases = tuning_cases(settings)
        failed += run_cases(stage, cases, jobs)
        choose_rates(stage, cases)
    rates = json.loads((stage.root / RATES).read_text())["chosen"]
    cases = fast_cases(settings) if fast else scored_cases(settings)
    ready = [case for case in cases if not case_is_trained(stage.root, case) or case.method in rates]
    failed += [case.name for case in cases if case not in ready]
    failed += run_cases(stage, ready, jobs)
    if failed:
        raise ValueError(f"{len(failed)} cases failed or lack a learning rate; logs in {LOGS}: {', '.join(failed)}")


def case_is_trained(root: Path, case: Case) -> bool:
    return case_params(root, case).chosen.trained


def run_cases(stage: Stage, cases: Sequence[Case], jobs: int) -> list[str]:
    """Those of `cases` that are stale, the reference before them if one needs it. Returns the names of those that failed."""
    data, behaviour = {path: stage.facts.deps[path] for path in DATA}, read_fingerprints(stage.root)
    work: dict[str, Callable[[], object]] = {}
    for case in cases:
        factor, params, made = wanted(stage.root, case, data)
        result = read_result(stage.root / RESULTS / f"{case.name}.json")
        if result is None or differences(result["made"], made):
            made["fingerprint"] = fingerprint(behaviour[case.method])[:12]
            work[case.name] = partial(_case, *_task(stage, case.name, params, made), case=case, factor=factor, made=made)
    if not work:
        return []
    params, made = reference_params(stage.root), reference_origin(stage.root, data)
    if any(case.percent is None and case.name in work for case in cases) and is_stale(stage.root, made):
        task = _task(stage, FULL_PRECISION, params, made)
        if run_all({FULL_PRECISION: partial(_reference, *task, made=made)}, 1, stage.home / LOGS):
            return [FULL_PRECISION, *work]
    return run_all(work, jobs, stage.home / LOGS)


def wanted(root: Path, case: Case, data: dict[str, str]) -> tuple[float, Params, dict[str, Any]]:
    """Learning-rate factor, parameters and origin of a case under the present settings."""
    factor = case.percent / 100 if case.percent is not None else read_factor(root, case.method)
    params = case_params(root, case, factor)
    return factor, params, origin(params, read_settings(root)["revisions"][case.method], data)


def reference_origin(root: Path, data: dict[str, str]) -> dict[str, Any]:
    made = origin(reference_params(root), 1, data)
    return made | {"params": {k: v for k, v in made["params"].items() if k.startswith(OF_THE_REFERENCE)}}


def _task(stage: Stage, name: str, params: Params, made: dict[str, Any]) -> tuple[Path, Path, Params, DvcFacts]:
    """The stage's facts for a process of its own, which reports a run named after the stage and the case."""
    facts = DvcFacts(f"{stage.facts.address}@{name}", stage.facts.command, made["data"], made["params"], outs=())
    return stage.root, stage.home, params, facts


def _case(root: Path, home: Path, params: Params, facts: DvcFacts, *, case: Case, factor: float, made: dict[str, Any]) -> None:
    from comparison.case import measure

    with recorded(facts.name, params, root, home, facts) as stage:
        measure(stage, case, factor, made)


def _reference(root: Path, home: Path, params: Params, facts: DvcFacts, *, made: dict[str, Any]) -> None:
    with recorded(facts.name, params, root, home, facts) as stage:
        measure_reference(stage, made)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run the cases whose results are missing or stale.")
    parser.add_argument("--fast", action="store_true", help="six cases, with the recorded learning rates")
    fast = parser.parse_args().fast
    stage_main("compare", partial(run, fast=fast))
