"""`qvgen doctor`: what it warns of is provoked for real: servers that hang, dead processes, old databases."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.commands import doctor
from pipelines.commands.doctor import Finding, examine
from pipelines.run.checkout import only_one, run_is_active
from pipelines.run.prefect_home import answers
from stages.record.journal import Journal
from tests.support import toy_project
from tests.support.toy_project import run

pytestmark = [pytest.mark.integration, pytest.mark.slow]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK"
HANG = 5.0  # seconds that a server which hangs may cost, with room for a busy machine


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return toy_project.make(tmp_path)


class Server:
    """Accepts connections and treats each as `behaviour` says; `requests` holds what arrived."""

    def __init__(self, behaviour: str) -> None:
        self.behaviour, self.requests = behaviour, []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._treat, args=(peer,), daemon=True).start()

    def _treat(self, peer: socket.socket) -> None:
        self.requests.append(peer.recv(4096).decode())
        try:
            if self.behaviour == "healthy":
                peer.sendall(OK)
            elif self.behaviour == "no http":
                peer.sendall(b"SSH-2.0-x\r\n")
            elif self.behaviour == "drips":
                for byte in OK:
                    peer.sendall(bytes([byte]))
                    time.sleep(0.5)
            else:
                time.sleep(60)
            peer.close()
        except OSError:
            pass


@pytest.fixture
def serve() -> Iterator[Callable[[str], Server]]:
    started: list[Server] = []

    def start(behaviour: str) -> Server:
        started.append(Server(behaviour))
        return started[-1]

    yield start
    for server in started:
        server.socket.close()


def tracking(project: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> Finding:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (check,) = doctor._tracking(project)
    assert "secret" not in str(check)
    return check


def test_a_password_is_sent_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable) -> None:
    server = serve("healthy")
    check = tracking(tmp_path, monkeypatch, f"http://user:secret@127.0.0.1:{server.port}")
    assert check.verdict == "PASS"
    assert "Basic " + base64.b64encode(b"user:secret").decode() in server.requests[0]


@pytest.mark.parametrize("login", ["", "user:secret@"])
@pytest.mark.parametrize("behaviour", ["silent", "drips", "no http"])
def test_a_server_that_hangs_costs_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable, behaviour: str, login: str
) -> None:
    server = serve(behaviour)
    began = time.monotonic()
    check = tracking(tmp_path, monkeypatch, f"http://{login}127.0.0.1:{server.port}")
    assert time.monotonic() - began < HANG
    assert check.verdict == "FAIL" and "lineage sync" in check.remedy
    assert server.requests, "the server was really asked"


def test_what_is_no_prefect_server_is_none(serve: Callable) -> None:
    assert not answers(f"http://127.0.0.1:{serve('no http').port}/api")


def test_the_address_of_prefect_shows_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://user:secret@127.0.0.1:{serve('healthy').port}/api")
    (check,) = doctor._prefect(tmp_path)
    assert check.verdict == "PASS" and "secret" not in str(check)


def test_a_database_server_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable) -> None:
    server = serve("silent")
    address = f"postgresql://user:secret@127.0.0.1:{server.port}/mlflow"
    assert tracking(tmp_path, monkeypatch, address).verdict == "PASS"
    server.socket.close()
    assert tracking(tmp_path, monkeypatch, "postgresql://user:secret@127.0.0.1:9/mlflow").verdict == "FAIL"
    assert tracking(tmp_path, monkeypatch, "postgresql://user:secret#x@host/mlflow").verdict == "WARN"


def test_databases_are_read_and_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mlflow.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert next(doctor._tracking(tmp_path)).verdict == "PASS" and not file.exists()
    file.touch()
    check = next(doctor._tracking(tmp_path))
    assert check.verdict == "FAIL" and "no MLflow database" in check.detail
    assert file.stat().st_size == 0
    with sqlite3.connect(file) as database:
        database.execute("create table alembic_version (version_num text)")
        database.execute("insert into alembic_version values ('0a8213491aaa')")
    check = next(doctor._tracking(tmp_path))
    assert check.verdict == "FAIL" and "0a8213491aaa" in check.detail and "db upgrade" in check.remedy


def test_the_lock_and_not_its_file_says_whether_a_run_is_active(tmp_path: Path) -> None:
    assert run_is_active(tmp_path) is None
    code = "import sys; from pathlib import Path; from pipelines.run.checkout import only_one\n"
    code += "with only_one(Path(sys.argv[1])):\n  print(1, flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline()
    assert run_is_active(tmp_path) == str(holder.pid)
    holder.kill()
    holder.wait()
    (tmp_path / ".qvgen" / "repro.pid").write_text("1")  # the number of a process that lives, and holds nothing
    assert run_is_active(tmp_path) is None
    with only_one(tmp_path):
        assert run_is_active(tmp_path)


def test_room_and_exposure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    for gib, verdict in ((0.5, "FAIL"), (3, "WARN"), (50, "PASS")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, gib=gib: usage._replace(free=int(gib * doctor.GIB)))
        assert next(doctor._room(tmp_path)).verdict == verdict


def test_a_folder_that_is_no_project(tmp_path: Path) -> None:
    found = {check.name: check for check in doctor._project(tmp_path)}
    assert found["git"].verdict == found["dvc"].verdict == "FAIL" and "dvc init" in found["dvc"].remedy


def test_versions_that_were_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "constraints.txt").write_text("prefect==0.1\nrich==0.1\n")
    monkeypatch.setattr(doctor, "version", lambda name: {"fastapi": "0.151.0", "SQLAlchemy": "2.1"}.get(name, "1.0"))
    found = {check.name: check for check in doctor._packages(tmp_path)}
    assert found["package fastapi"].verdict == "FAIL" and "server dies" in found["package fastapi"].remedy
    assert found["package prefect"].verdict == found["other packages"].verdict == "WARN"
    assert "rich" in found["other packages"].detail


def test_the_exit_code_and_json(project: Path) -> None:
    code, output = run(project, "pipelines.cli", "doctor", "--json", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert code == 1
    assert {check["name"] for check in json.loads(output) if check["verdict"] == "FAIL"} == {"mlflow"}


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
    after = {check.name: check for check in examine(project)}
    assert str(gone.pid) in after["dvc locks"].detail
    assert after["journals"].remedy == "qvgen lineage sync" and after["journals"].verdict == "WARN"
    assert "DO_NOT_TRACK" in after["telemetry"].detail


def test_leftovers_of_a_copy_that_was_cut_short_are_named(project: Path) -> None:
    (project / "artifacts" / "a").mkdir(parents=True)
    (project / "artifacts" / "a" / ".value.x.tmp").touch()
    (finding,) = doctor._leftovers(project)
    assert finding.verdict == "WARN" and "artifacts/a/.value.x.tmp" in finding.detail and "-delete" in finding.remedy
