"""`qvgen compare`: the stages of comparison/dvc.yaml, several cases at a time.

A case that is up to date is not run again, so an interrupted comparison goes on where it stopped. All cases share one parent
in MLflow for as long as comparison/params.yaml is the same.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from pipelines.run.checkout import environment, only_one

FILE = "comparison/dvc.yaml"
RATES = "comparison/learning_rates.json"
PAGE = "reports/comparison.html"


def compare(root: Path, jobs: int, fast: bool = False) -> int:
    """Run it and return 0, or the exit code of what failed. The report is written of what there is.

    Raises ValueError for `fast` before any learning rates were recorded.
    """
    if fast and not (root / RATES).is_file():
        raise ValueError(
            f"--fast uses the learning rates that a whole comparison chose, and {RATES} is not there: run without it"
        )
    token = f"comparison-{hashlib.sha256((root / 'comparison/params.yaml').read_bytes()).hexdigest()[:12]}"
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    variables = environment(root) | {"OMP_NUM_THREADS": threads, "QVGEN_EXECUTION": token, "QVGEN_JOBS": str(jobs)}
    repro = [sys.executable, "-m", "dvc", "repro"]
    if fast:  # DVC must not take six cases for the whole stage
        commands = [[*repro, "prepare"], [sys.executable, "-m", "comparison.run", "--fast"]]
    else:
        commands = [[*repro, f"{FILE}:compare"]]
    with only_one(root):
        code = next((code for command in commands if (code := _guarded(root, command, variables))), 0)
        again = [] if (root / PAGE).is_file() else ["--force"]  # DVC does not know the page
        report = _guarded(root, [*repro, "--single-item", *again, f"{FILE}:report"], variables)
    return code or report


def _guarded(root: Path, command: list[str], variables: dict[str, str]) -> int:
    """Exit code of a command that ends with this process, however that ends."""
    guard = [sys.executable, "-m", "pipelines.run.guard", "--"]
    return subprocess.run([*guard, *command], cwd=root, env=variables, check=False).returncode
