"""`qvgen status`, `doctor` and `ui` in a real project, against real servers and real dead processes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from pipelines.doctor import examine
from pipelines.status import read_status
from stages._journal import Journal
from tests.integration import toy_project
from tests.integration.toy_project import processes_in, run, start, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return toy_project.make(tmp_path)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_status_says_why(project: Path) -> None:
    assert {s.stage: s.reasons[0] for s in read_status(project)} == dict.fromkeys("abcd", "never ran")
    code, output = run(project, "dvc", "repro")
    assert code == 0, output
    assert not any(status.runs for status in read_status(project))

    (project / "stages" / "b.py").write_text((project / "stages" / "b.py").read_text() + "# more\n")
    (project / "artifacts" / "c" / "value").write_text("spoilt")
    by_name = {status.stage: status for status in read_status(project)}
    assert not by_name["a"].runs
    assert by_name["b"].reasons == ("stages/b.py changed",)
    assert by_name["c"].reasons == ("output artifacts/c changed",)
    assert by_name["d"].upstream == ("b", "c")

    params = yaml.safe_load((project / "params.yaml").read_text())
    (project / "params.yaml").write_text(yaml.safe_dump(params | {"seed": 7}, sort_keys=False))
    assert "seed: 0 -> 7" in {status.stage: status for status in read_status(project, ["a"])}["a"].reasons
    with pytest.raises(ValueError, match="has a stage 'nosuch'"):
        read_status(project, ["nosuch"])


def test_doctor_finds_what_is_wrong(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = {check.name: check for check in examine(project)}
    assert not [check for check in before.values() if check.verdict == "FAIL"]
    assert before["journals"].verdict == before["dvc locks"].verdict == before["telemetry"].verdict == "PASS"

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (project / ".dvc" / "tmp").mkdir(exist_ok=True)
    lock = {str(project / "artifacts"): {"write": {"pid": gone.pid, "cmd": "dvc repro"}}}
    (project / ".dvc" / "tmp" / "rwlock").write_text(json.dumps(lock))
    Journal.create(project, "a", "pipeline-x", tags={"dvc.stage": "a"}, params={}).end("FINISHED")
    monkeypatch.setenv("DO_NOT_TRACK", "0")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        threading.Thread(target=lambda: [silent.accept() for _ in range(2)], daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        after = {check.name: check for check in examine(project)}
    assert time.monotonic() - started < 30
    assert str(gone.pid) in after["dvc locks"].detail
    assert after["journals"].remedy == "qvgen lineage sync" and after["journals"].verdict == "WARN"
    assert "DO_NOT_TRACK" in after["telemetry"].detail
    assert after["mlflow"].verdict == "FAIL" and "secret" not in after["mlflow"].detail


def test_ui_starts_both_servers_and_leaves_nothing(project: Path) -> None:
    code, output = run(project, "pipelines.cli", "ui", "--no-browser")
    assert code == 1 and "no runs are recorded yet" in output
    assert run(project, "dvc", "repro", "a")[0] == 0
    ports = free_port(), free_port()
    options = ["--no-browser", "--mlflow-port", str(ports[0]), "--prefect-port", str(ports[1])]
    process = start(project, "pipelines.cli", "ui", *options)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        assert lines == [f"MLflow:  http://127.0.0.1:{ports[0]}\n", f"Prefect: http://127.0.0.1:{ports[1]}\n"]
        for address in (f"http://127.0.0.1:{ports[0]}/", f"http://127.0.0.1:{ports[1]}/api/health"):
            with urllib.request.urlopen(address, timeout=30) as reply:
                assert reply.status == 200
    finally:
        process.terminate()
        process.communicate(timeout=60)
    wait_until(lambda: not processes_in(project), lambda: str(processes_in(project)), 60)

    with socket.create_server(("127.0.0.1", ports[0])):
        code, output = run(project, "pipelines.cli", "ui", *options)
    assert code == 1 and f"port {ports[0]} is taken" in output
