"""Stages report through the journal to MLflow: real processes, a real DVC project, a real database."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.record.connection import connect
from stages.record.journal import read_events, read_receipt

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
POINTS = 40
SECONDS = 600  # on a busy machine; each wait takes a few seconds on a quiet one
STAGE = """
import sys, time
from stages.runtime.run import stage_main

def run(stage):
    ask = stage.root / "ask"
    mode = ask.read_text() if ask.exists() else ""
    resumed = list(stage.checkpoint_dir.iterdir())
    (stage.checkpoint_dir / "step").write_text("1")
    with stage.outputs(f"out/{stage.name}") as folder:
        (folder / "resumed").write_text(str(len(resumed)))
        for step in range(40):
            stage.log_metrics({"loss": 1 / (step + 1), "rank": step}, step=step)
        if mode == "hang":
            (stage.root / "started").touch()
            time.sleep(600)
        if mode == "fail":
            raise ValueError("qat.steps = -1: use 0 or more")
    stage.log_metrics({"final": 1})
    stage.log_artifact(f"out/{stage.name}")
    stage.log_text("# hello", "notes/hello.md")

stage_main(%r, run)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC project of four stages: b, c and d depend on a. It uses this checkout's library and record."""
    root = tmp_path_factory.mktemp("project")
    (root / "qvgen").symlink_to(ROOT / "qvgen")
    (root / "stages").mkdir()
    for shared in ("__init__.py", "observe.py", "runtime", "record"):
        (root / "stages" / shared).symlink_to(ROOT / "stages" / shared)
    shutil.copy(ROOT / "params.yaml", root)
    stages = {}
    for name in "abcd":
        (root / "stages" / f"{name}.py").write_text(STAGE % name)
        deps = [f"stages/{name}.py", *(["out/a"] if name != "a" else [])]
        stages[name] = {
            "cmd": f"python -m stages.{name}",
            "deps": deps,
            "params": ["seed", "qat"],
            "outs": [f"out/{name}"],
        }
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (root / ".gitignore").write_text(".qvgen/\nout/\nmlflow.db\nmlruns/\nask\nstarted\n__pycache__/\n")
    for command in ("git init -q", "dvc init -q", "git add -A", "git -c user.name=t -c user.email=t@t commit -qm start"):
        subprocess.run([*program(command)], cwd=root, check=True)
    return root


def program(command: str) -> list[str]:
    first, *rest = command.split()
    return [sys.executable, "-m", first, *rest] if first == "dvc" else [first, *rest]


def start(project: Path, command: str, **variables: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "QVGEN_"))}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    first, *rest = command.split()
    arguments = [sys.executable, "-m", first, *rest]
    return subprocess.Popen(
        arguments, cwd=project, env=environment | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(project: Path, command: str, **variables: str) -> tuple[int, str]:
    process = start(project, command, **variables)
    output, _ = process.communicate(timeout=SECONDS)
    return process.returncode, output


def ask(project: Path, mode: str) -> None:
    (project / "started").unlink(missing_ok=True)
    (project / "ask").write_text(mode)


def journals(project: Path, stage: str) -> list[Path]:
    return sorted((project / ".qvgen" / "journal").glob(f"*-{stage}-*.jsonl"), key=lambda path: path.stat().st_mtime)


def wait_until(condition: Any, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@pytest.fixture
def client(project: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return connect(project)[0]


def run_of(client: Any, journal: Path) -> Any:
    wait_until(lambda: read_receipt(journal).get("complete"))
    return client.get_run(read_receipt(journal)["run_id"])


def loss_points(client: Any, run: Any) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")]


ALL_POINTS = [(step, 1 / (step + 1)) for step in range(POINTS)]


def test_four_stages_at_once_on_a_fresh_database(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a parallel flow starts them. MLflow by itself crashes here: three of four find half-made tables."""
    assert run(project, "stages.a")[0] == 0  # so that b, c and d have their dependency
    for path in (project / "mlflow.db", project / "mlruns"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(project / ".qvgen" / "journal")

    root = {"DVC_ROOT": str(project)}
    processes = {name: start(project, f"stages.{name}", DVC_STAGE=name, **root) for name in "abcd"}
    outputs = {name: process.communicate(timeout=SECONDS)[0] for name, process in processes.items()}
    assert {name: process.returncode for name, process in processes.items()} == dict.fromkeys("abcd", 0), outputs
    assert "warning" not in "".join(outputs.values())

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client, _ = connect(project)
    parents = set()
    for name in "abcd":
        (journal,) = journals(project, name)
        found = run_of(client, journal)
        assert found.info.status == "FINISHED"
        assert loss_points(client, found) == ALL_POINTS
        parents.add(found.data.tags["mlflow.parentRunId"])
    (parent,) = parents  # all were started by this process
    assert client.get_run(parent).info.status == "FINISHED"


def test_dvc_repro_is_one_parent_run_with_a_child_for_each_stage(project: Path, client: Any) -> None:
    code, output = run(project, "dvc repro --force a b")
    assert code == 0, output
    lock = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    found = {name: run_of(client, journals(project, name)[-1]) for name in "ab"}
    for name, child in found.items():
        tags = child.data.tags
        assert child.info.run_name == tags["dvc.stage"] == name
        assert tags["dvc.key"].startswith(f"{name}-")
        for kind, tag in (("deps", "dvc.dep."), ("outs", "dvc.out.")):
            expected = {tag + entry["path"]: entry["md5"] for entry in lock[name][kind]}
            assert {key: value for key, value in tags.items() if key.startswith(tag)} == expected
        assert child.data.params["qat.steps"] == str(yaml.safe_load((project / "params.yaml").read_text())["qat"]["steps"])
        assert child.data.params["seed"] == "0"
        assert child.data.metrics["final"] == 1
        assert [a.path for a in client.list_artifacts(child.info.run_id)] == [name, "notes"]
    parent_id = found["a"].data.tags["mlflow.parentRunId"]
    assert found["b"].data.tags["mlflow.parentRunId"] == parent_id
    parent = client.get_run(parent_id)
    assert parent.info.status == "FINISHED"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True).stdout.strip()
    assert {run.data.tags["git.commit"] for run in (parent, *found.values())} == {commit}
    # b starts while git already shows a's change of dvc.lock, which is the pipeline's own doing.
    assert {run.data.tags["git.dirty"] for run in (parent, *found.values())} == {"false"}

    code, output = run(project, "dvc repro a b")
    assert code == 0 and "didn't change" in output
    assert journals(project, "a")[-1].stem == found["a"].data.tags["journal.id"], "an unchanged stage leaves no run"


def test_a_given_parent_run_is_used(project: Path, client: Any) -> None:
    experiment = client.get_experiment_by_name("qvgen").experiment_id
    parent = client.create_run(experiment, run_name="flow").info.run_id
    assert run(project, "stages.a", QVGEN_PARENT_RUN_ID=parent)[0] == 0
    assert run_of(client, journals(project, "a")[-1]).data.tags["mlflow.parentRunId"] == parent


def test_tracking_that_refuses_connections_costs_nothing_and_is_caught_up_later(project: Path, client: Any) -> None:
    began = time.monotonic()
    code, output = run(project, "stages.a", MLFLOW_TRACKING_URI="http://user:secret@127.0.0.1:9")
    assert code == 0, output
    assert time.monotonic() - began < 200, "MLflow's own settings wait 248 s for each call"
    assert output.count("warning: tracking at http://127.0.0.1:9 does not answer") == 1
    assert "secret" not in output
    journal = journals(project, "a")[-1]
    events, _ = read_events(journal)
    assert [(e["step"], e["values"]["loss"]) for e in events if "loss" in e.get("values", {})] == ALL_POINTS
    assert "run_id" not in read_receipt(journal)

    for _ in range(2):  # sending twice adds nothing
        code, output = run(project, f"stages.record.sender {journal}")
        assert code == 0, output
    found = run_of(client, journal)
    assert found.info.status == "FINISHED"
    assert found.info.start_time == events[0]["time"] and found.info.end_time == events[-1]["time"]
    assert loss_points(client, found) == ALL_POINTS
    experiment = found.info.experiment_id
    assert len(client.search_runs([experiment], f"tags.`journal.id` = '{journal.stem}'")) == 1


def test_kill_9_leaves_a_whole_journal_and_the_next_run_resumes(project: Path, client: Any) -> None:
    ask(project, "hang")
    process = start(project, "stages.a")
    wait_until((project / "started").exists)
    process.kill()
    process.wait()
    journal = journals(project, "a")[-1]
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    found = run_of(client, journal)
    assert found.info.status == "KILLED"
    assert loss_points(client, found) == ALL_POINTS
    assert client.get_run(found.data.tags["mlflow.parentRunId"]).info.status == "KILLED"

    ask(project, "")
    assert run(project, "stages.a")[0] == 0
    assert (project / "out" / "a" / "resumed").read_text() == "1"
    assert run(project, "stages.a")[0] == 0
    assert (project / "out" / "a" / "resumed").read_text() == "0", "a stage that succeeded leaves no checkpoint"


@pytest.fixture
def hangup_counts() -> Iterator[None]:
    """Under nohup SIGHUP is ignored, which processes inherit, and a stage leaves it so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup_counts")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_stage_says_so_and_keeps_the_old_output(
    project: Path, client: Any, tmp_path: Path, signum: int, code: int
) -> None:
    ask(project, "")
    assert run(project, "stages.a")[0] == 0
    ask(project, "hang")
    process = start(project, "stages.a")
    wait_until((project / "started").exists)
    second_code, second_output = run(project, "stages.a")
    assert second_code == 1
    assert f"this stage already runs in {project} (process {process.pid})" in second_output
    if signum == signal.SIGINT:  # nor does an experiment in a folder of its own, which has its checkpoints here
        shutil.copytree(project, copy := tmp_path / "experiment", symlinks=True)
        assert (second_code, second_output) == run(copy, "stages.a", DVC_ROOT=str(project))
    process.send_signal(signum)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == code
    assert "a: interrupted; run again to continue" in output and "Traceback" not in output
    journal = journals(project, "a")[-1]
    assert run_of(client, journal).info.status == "KILLED"
    assert (project / "out" / "a" / "resumed").exists()
    assert [path.name for path in (project / "out").iterdir() if path.name.startswith(".")] == []

    params = yaml.safe_load((project / "params.yaml").read_text())
    params["qat"]["steps"] += 1
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    ask(project, "")
    assert run(project, "stages.a")[0] == 0
    shutil.copy(ROOT / "params.yaml", project)
    assert (project / "out" / "a" / "resumed").read_text() == "0", "a changed parameter starts fresh"


def test_a_failed_stage_gives_one_message_and_its_traceback_on_demand(project: Path, client: Any) -> None:
    ask(project, "")
    assert run(project, "dvc repro a")[0] == 0
    ask(project, "fail")
    code, output = run(project, "dvc repro --force a")
    assert code != 0
    assert (project / "out" / "a" / "resumed").exists(), "DVC deleted the old output, and it came back"
    assert "a: qat.steps = -1: use 0 or more" in output and "Traceback" not in output
    found = run_of(client, journals(project, "a")[-1])
    assert found.info.status == "FAILED"
    assert client.get_run(found.data.tags["mlflow.parentRunId"]).info.status == "FAILED"
    assert "error.txt" in [a.path for a in client.list_artifacts(found.info.run_id)]
    code, output = run(project, "stages.a", QVGEN_DEBUG="1")
    assert code == 1 and "Traceback" in output
    ask(project, "")


def test_a_bad_parameter_and_a_missing_input_are_named_before_anything_starts(project: Path) -> None:
    ask(project, "")
    assert run(project, "dvc repro a")[0] == 0
    before = len(journals(project, "b"))
    (project / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("seed: 0", "seed: -1"))
    code, output = run(project, "stages.b")
    shutil.copy(ROOT / "params.yaml", project)
    assert code == 1 and "seed = -1" in output and "Traceback" not in output
    (project / "out" / "a").rename(project / "out" / "kept")
    code, output = run(project, "stages.b")
    (project / "out" / "kept").rename(project / "out" / "a")
    assert code == 1 and "out/a does not exist; `dvc repro b` makes" in output
    assert len(journals(project, "b")) == before
