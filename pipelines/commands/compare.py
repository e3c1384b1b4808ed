"""`qvgen compare`: the stages of comparison/dvc.yaml, several at a time, each as a `dvc repro` of its own.

What is up to date is not run again, so an interrupted comparison goes on where it stopped. All runs share one parent in
MLflow for as long as comparison/params.yaml is the same.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from pipelines.run.checkout import environment, only_one
from pipelines.run.dag import Graph, read_graph, with_upstream

FILE = "comparison/dvc.yaml"
REPORT = f"{FILE}:compare_report"
RATES = "comparison/learning_rates.json"
# A look at the order of things: one seed, one bit width, no search of learning rates (the recorded ones are used).
FAST = (
    "compare_code",
    "compare_reference",
    *(f"compare_case_untrained@0-W4A4-{method}" for method in ("rtn", "mse", "svdquant")),
    *(f"compare_case@0-W4A4-{method}" for method in ("kd", "qvgen", "qvgen+")),
)
LOGS = Path(".qvgen/logs")


def compare(root: Path, jobs: int, fast: bool = False) -> int:
    """Run it and return 0, or 1 if a stage failed: then those that do not need it still run, and it is named.

    Raises ValueError for `fast` before any learning rates were recorded.
    """
    if fast and not (root / RATES).is_file():
        raise ValueError(
            f"--fast uses the learning rates that a whole comparison chose, and {RATES} is not there: run without it"
        )
    graph = read_graph(root)
    if fast:
        chosen = {f"{FILE}:{name}" for name in FAST} | {REPORT}
        main = with_upstream(graph, {f"{FILE}:compare_reference"})
        graph = {name: needs & (chosen | main) for name, needs in graph.items() if name in chosen | main}
    else:
        wanted = with_upstream(graph, {name for name in graph if name.startswith(f"{FILE}:")})
        graph = {name: needs for name, needs in graph.items() if name in wanted}
    token = f"comparison-{hashlib.sha256((root / 'comparison/params.yaml').read_bytes()).hexdigest()[:12]}"
    variables = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), "QVGEN_EXECUTION": token}
    with only_one(root):
        failed = run_graph(graph, jobs, lambda name: _repro(root, name, environment(root) | variables))
    if failed:
        print(f"{len(failed)} stages failed or lack what they need; logs in {LOGS}: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def run_graph(graph: Graph, jobs: int, run: Callable[[str], bool]) -> list[str]:
    """Call `run(stage)` for every stage once all that it needs has succeeded, at most `jobs` at a time, in an order that
    starts what comes first in the graph. Returns the stages that failed and those that were left out because of them."""
    from tqdm import tqdm

    waiting, done, running = list(graph), set[str](), dict[Future[bool], str]()
    failed: list[str] = []
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(graph), unit="stage", disable=None) as progress:
        while waiting or running:
            lost = [name for name in waiting if graph[name] & set(failed)]
            failed += lost
            waiting = [name for name in waiting if name not in lost]
            ready = [name for name in waiting if graph[name] <= done][: jobs - len(running)]
            for name in ready:
                running[pool.submit(run, name)] = name
            waiting = [name for name in waiting if name not in ready]
            if not running:
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                (done.add if future.result() else failed.append)(name)
                progress.update()
    return failed


def _repro(root: Path, name: str, variables: dict[str, str]) -> bool:
    """One stage, upstream left alone. Its output goes to a log."""
    log = root / LOGS / f"{name.rpartition(':')[2]}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    dvc = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]
    command = [sys.executable, "-m", "pipelines.run.guard", "--", *dvc]  # it ends with this process, however that ends
    started = time.monotonic()
    with log.open("w") as file:
        done = subprocess.run(command, cwd=root, env=variables, stdout=file, stderr=subprocess.STDOUT, check=False)
    state = "failed" if done.returncode else "done"
    print(f"{time.strftime('%H:%M:%S')} {state} {name.rpartition(':')[2]} ({time.monotonic() - started:.0f} s)", flush=True)
    return done.returncode == 0
