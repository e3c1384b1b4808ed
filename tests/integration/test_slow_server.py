"""A tracking server that answers a byte a second: no read ever times out, and no stage may wait for it for ever."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.audit.report import audit
from pipelines.champion import registry
from pipelines.champion.promote import promote
from qvgen.params import load_params
from stages.record.journal import FINISH_SECONDS
from tests.support import toy_project
from tests.support.toy_project import processes_in, start, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.slow]

BOUND = FINISH_SECONDS + 90  # one stage; DVC, imports and a busy machine take the rest


@pytest.fixture
def address() -> Iterator[str]:
    """Reads the request, then sends the head of an answer that never ends."""
    ended = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                for byte in "HTTP/1.1 200 OK\r\n" + "x-slow: " + "y" * 10_000:
                    connection.sendall(byte.encode())
                    if ended.wait(1):
                        return
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        ended.set()


def test_dvc_repro_into_a_pipe_ends_although_tracking_does_not_answer(tmp_path: Path, address: str) -> None:
    toy_project.make(tmp_path)
    began = time.monotonic()
    process = start(tmp_path, "dvc", "repro", "a", MLFLOW_TRACKING_URI=address)
    try:  # `communicate` reads to the end of the pipe, as `| tee log` does
        output, _ = process.communicate(timeout=BOUND)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"hangs after {time.monotonic() - began:.0f} s")
    assert process.returncode == 0, output
    assert (tmp_path / "artifacts/a/value").is_file()
    assert output.count("does not answer") == 1 and "within 30 s" in output, output
    wait_until(lambda: not processes_in(tmp_path), lambda: str(processes_in(tmp_path)), 60)


def test_qvgen_repro_ends_too(tmp_path: Path, address: str, prefect_server: dict[str, str]) -> None:
    toy_project.make(tmp_path)
    process = start(tmp_path, "pipelines.cli", "repro", "a", MLFLOW_TRACKING_URI=address, **prefect_server)
    try:
        output, _ = process.communicate(timeout=2 * BOUND)  # the stage, and the end of the execution
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail("hangs")
    assert process.returncode == 0, output
    assert "Traceback" not in output and "To track the changes with git" not in output, output


def test_promote_and_audit_by_hand_end_too(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    shutil.copy(toy_project.ROOT / "params.yaml", tmp_path)
    monkeypatch.setattr(registry, "SECONDS", 8.0)
    monkeypatch.setattr(registry, "READING_SECONDS", 8.0)
    for command in (lambda: promote(tmp_path, load_params(tmp_path / "params.yaml")), lambda: audit(tmp_path, "qvgen/1")):
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"too slow|does not answer"):
            command()
        assert time.monotonic() - began < 30
