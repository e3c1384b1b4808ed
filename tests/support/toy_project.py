"""A real git and DVC project of four small stages (a; b and c need a; d needs both) that report as stages do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[2]
PATIENCE = 300  # seconds, on a busy machine
STAGE = """
import time
from stages.runtime.run import stage_main

def run(stage):
    ask = stage.root / "ask"
    mode = ask.read_text() if ask.exists() else ""
    with stage.outputs(f"artifacts/{stage.name}") as folder:
        (folder / "value").write_text(f"{stage.name} {stage.params.seed}")
        stage.log_metrics({"loss": 0.5}, step=1)
        if mode == f"hang {stage.name}":
            (stage.root / "started").touch()
            time.sleep(600)
        if mode == f"fail {stage.name}":
            raise ValueError("qat.steps = -1: use 0 or more")

stage_main(%r, run)
"""
FLOW = """# What `qvgen repro` runs. Dask's workers import this file as well, and must not run it.
import signal
from pathlib import Path
from pipelines.run.flow import run_pipeline

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as the command: a shell's `&` ignores it
    print(run_pipeline(Path.cwd()))
"""
NEEDS = {"a": "", "b": "a", "c": "a", "d": "bc"}
IGNORED = (".qvgen/", "artifacts/", "mlflow.db*", "mlruns/", "ask", "started", "run_flow.py", "__pycache__/")


def make(root: Path, settings: dict[str, Any] | None = None) -> Path:
    """Write and commit the project; `settings` change the section `flow` of params.yaml."""
    (root / "qvgen").symlink_to(ROOT / "qvgen")
    (root / "stages").mkdir()
    for shared in ("__init__.py", "observe.py", "runtime", "record"):
        (root / "stages" / shared).symlink_to(ROOT / "stages" / shared)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["flow"] |= {"workers": 2} | (settings or {})
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    stages = {}
    for name, needs in NEEDS.items():
        (root / "stages" / f"{name}.py").write_text(STAGE % name)
        deps = [f"stages/{name}.py", *(f"artifacts/{need}" for need in needs)]
        stages[name] = {"cmd": f"python -m stages.{name}", "deps": deps, "params": ["seed"], "outs": [f"artifacts/{name}"]}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    # Nothing of the pipeline: it neither runs with it nor is a reason to run.
    (root / "aside").mkdir()
    aside = {"stages": {"other": {"cmd": "echo > out", "outs": [{"out": {"cache": False}}]}}}
    (root / "aside" / "dvc.yaml").write_text(yaml.safe_dump(aside))
    (root / "metrics").mkdir()
    shutil.copy(ROOT / "metrics" / "evaluate.json", root / "metrics")  # something to show as results
    (root / ".gitignore").write_text("\n".join(IGNORED) + "\n")
    shutil.copy(ROOT / ".env.defaults", root)
    for command in ("git init -q", "git config user.name t", "git config user.email t@t"):
        subprocess.run(command.split(), cwd=root, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=root, check=True)
    (root / "raw.txt").write_text("data that no stage makes")
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "raw.txt"], cwd=root, check=True)
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)
    subprocess.run(["git", "commit", "-qm", "start"], cwd=root, check=True)
    return root


def environment() -> dict[str, str]:
    """This process's variables without those that steer the tools, and with this checkout's packages."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "QVGEN_", "PREFECT_"))}
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
    kept["PYTHONPATH"] = str(ROOT)
    return kept


def start(root: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """`python -m ...` in the project, with this checkout's pipelines/."""
    kept = environment()
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=root,
        env=kept | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_flow(root: Path, **variables: str) -> subprocess.Popen[str]:
    """The flow in a process of its own, which prints its rows."""
    (root / "run_flow.py").write_text(FLOW)
    return start(root, "run_flow", **variables)


def run(root: Path, *arguments: str, seconds: float = 600, **variables: str) -> tuple[int, str]:
    process = start(root, *arguments, **variables)
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def wait_until(condition: Callable[[], Any], explain: Callable[[], str] = lambda: "", seconds: float = PATIENCE) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"it did not happen in time: {explain()[-3000:]}"
        time.sleep(0.2)
    return found


def processes_in(project: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(project) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found
