"""A small project that `qvgen audit` can be held against: real git, DVC, MLflow and stage register, toy stages before it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PREPARE = """
from stages.runtime.run import stage_main

def run(stage):
    with stage.outputs("artifacts/data") as folder:
        for i in range(3):
            (folder / f"{i}.txt").write_text(f"{stage.params.seed} {(stage.root / 'assets/raw.txt').read_text()} {i}")

stage_main("prepare", run)
"""
PACK = """
import hashlib, json
import numpy as np
from safetensors.numpy import save_file

from qvgen.packing.config import to_config
from stages.runtime.run import stage_main

def run(stage):
    seen = "".join(file.read_text() for file in sorted((stage.root / "artifacts/data").iterdir()))
    weights = np.frombuffer(hashlib.sha256(seen.encode()).digest(), dtype=np.uint8)
    with stage.outputs("artifacts/packed") as folder:
        (folder / "transformer").mkdir()
        save_file({"weight": weights}, folder / "transformer" / "weights.safetensors")
        config = {"quantization_config": to_config(stage.params.scheme, 1)}
        (folder / "transformer" / "config.json").write_text(json.dumps(config))
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
        sampling = {"frames": 9, "height": 32, "width": 32, "inference_steps": 20, "guidance_scale": 3.0, "fps": 8}
        (folder / "generation.json").write_text(json.dumps(sampling))
    for step in range(3):
        stage.log_metrics({"loss": 1 / (1 + step)}, step=step)
    stage.log_text("a table", "table.md")

stage_main("pack", run)
"""
MEASURE = """
from stages.runtime.run import stage_main

def run(stage):
    for name in ("evaluate", "benchmark"):
        with stage.outputs(f"metrics/{name}.json") as path:
            path.write_text((stage.root / f"assets/{name}.json").read_text())

stage_main("measure", run)
"""
CODE, INPUTS = "artifacts/code.json", "artifacts/inputs.json"
STAGES = {
    "prepare": {
        "cmd": "python -m stages.prepare",
        "params": ["seed", "prepare", {CODE: ["code.prepare"]}, {INPUTS: ["inputs.prepare"]}],
        "deps": ["assets/raw.txt"],
        "outs": ["artifacts/data"],
    },
    "pack": {
        "cmd": "python -m stages.pack",
        "params": ["method", "scheme", {CODE: ["code.pack"]}],
        "deps": ["artifacts/data"],
        "outs": ["artifacts/packed"],
    },
    "measure": {
        "cmd": "python -m stages.measure",
        "params": [{CODE: ["code.measure"]}],
        "deps": ["artifacts/packed", "assets/evaluate.json", "assets/benchmark.json"],
        "metrics": [{f"metrics/{name}.json": {"cache": False}} for name in ("evaluate", "benchmark")],
    },
    "register": {
        "cmd": "python -m stages.register",
        "params": ["register", {CODE: ["code.register"]}],
        "deps": ["artifacts/packed", "metrics/evaluate.json", "metrics/benchmark.json"],
        "metrics": [{"metrics/register.json": {"cache": False}}],
    },
}
IGNORED = (".qvgen/", "artifacts/", "mlflow.db*", "mlruns/", "__pycache__/", "rebuilt/", "audit.json")


def make(root: Path) -> Path:
    """Write and commit the project; nothing has run yet."""
    shutil.copytree(ROOT / "qvgen", root / "qvgen", ignore=shutil.ignore_patterns("__pycache__", "csrc"))
    for folder in ("stages", "assets"):
        (root / folder).mkdir()
    for script in ("__init__.py", "register.py", "observe.py", "dvc.yaml"):
        shutil.copy(ROOT / "stages" / script, root / "stages")
    for folder in ("runtime", "record"):
        shutil.copytree(ROOT / "stages" / folder, root / "stages" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, script in (("prepare", PREPARE), ("pack", PACK), ("measure", MEASURE)):
        (root / "stages" / f"{name}.py").write_text(script)
    for name in ("evaluate", "benchmark"):
        shutil.copy(ROOT / "metrics" / f"{name}.json", root / "assets")
    (root / "assets/raw.txt").write_text("digits")
    for name in ("params.yaml", "constraints.txt", ".env.defaults"):
        shutil.copy(ROOT / name, root)
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}, sort_keys=False))
    (root / ".gitignore").write_text("\n".join(IGNORED) + "\n")
    git(root, "init", "-q")
    git(root, "config", "user.name", "t")
    git(root, "config", "user.email", "t@t")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=root, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "assets/raw.txt"], cwd=root, check=True)
    commit(root, "start")
    return root


def make_with_champion(folder: Path) -> Path:
    """The project after its first run, the gate and the commit of what it wrote. MLFLOW_TRACKING_URI must not be set."""
    from pipelines.champion.promote import promote_after_run

    root = make(folder)
    code, output = run(root, "dvc", "repro")
    assert code == 0, output
    assert promote_after_run(root) == "qvgen version 1 is champion now (7 rules passed)"
    commit(root, "results")
    return root


def copy(project: Path, to: Path) -> Path:
    """With its runs: MLflow's database names the folder of each run's artifacts with its whole path."""
    shutil.copytree(project, to, symlinks=True)
    columns = {
        "experiments": "artifact_location",
        "runs": "artifact_uri",
        "logged_models": "artifact_location",
        "model_versions": "storage_location",
    }
    with contextlib.closing(sqlite3.connect(to / "mlflow.db")) as database, database:
        for table, column in columns.items():
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(project), str(to)))
    return to


def failed(root: Path, reference: str = "qvgen@champion") -> dict[str, str]:
    """Checks of the audit that do not pass -> detail."""
    from pipelines.audit.report import audit

    return {check.name: check.detail for check in audit(root, reference).checks if not check.ok}


def git(root: Path, *command: str) -> str:
    return subprocess.run(["git", *command], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def commit(root: Path, message: str) -> None:
    git(root, "add", "-A")
    git(root, "commit", "-qm", message)


def run(root: Path, *command: str, **variables: str) -> tuple[int, str]:
    """Exit code and output of a command; `qvgen`, `dvc` and `python` are those of this environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_", "QVGEN_"))}
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
    kept["PYTHONPATH"] = str(ROOT)
    programs = {"qvgen": [sys.executable, "-m", "pipelines.cli"], "dvc": [sys.executable, "-m", "dvc"]}
    first, *rest = command
    done = subprocess.run(
        [*programs.get(first, [first]), *rest],
        cwd=root,
        env=kept | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


def set_psnr(root: Path, value: float) -> None:
    """Another measurement for the next run, not committed."""
    path = root / "assets/evaluate.json"
    content = json.loads(path.read_text())
    content["packed"]["psnr_db"] = value
    path.write_text(json.dumps(content))
