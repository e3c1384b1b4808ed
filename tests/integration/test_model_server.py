"""`qvgen serve-model`, a real process in an environment with `qvgen[serve]` alone: it answers as `mlflow models serve` does,
and follows the champion."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import pytest
from mlflow import MlflowClient

from qvgen.hub.promotions import move_alias
from qvgen.hub.rollback import rollback
from qvgen.serving.server import LARGEST_TEXT
from tests.support.fresh_venv import Installed
from tests.support.invocations import ask, get, post
from tests.support.packed_model import make_packed
from tests.support.registered import make_wish, outside, read_folder, register, using
from tests.support.services import free_port, server
from tests.support.toy_project import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.slow]

NAME = "followed"
INTERVAL = 0.3  # seconds
STEPS, MOST_STEPS = 60, 300
# A request that takes long enough to be seen at work, some seconds: as many videos and steps as may be.
ROWS = {"columns": ["prompt", "seed"], "data": [["a red digit three", seed] for seed in range(4)]}
LONG = json.dumps({"dataframe_split": ROWS, "params": {"steps": MOST_STEPS}}).encode()


@dataclass
class Served:
    """`sha256`: version -> of its video for seed 1."""

    address: str
    log: Path
    client: MlflowClient
    sha256: dict[int, str]
    process: subprocess.Popen[bytes]

    def promote(self, version: int) -> None:
        move_alias(self.client, NAME, "champion", version, reason="passed the gate")

    def version(self) -> int:
        return json.loads(get(f"{self.address}/version"))["version"]

    def number(self, line: str) -> float:
        """Of a line of /metrics."""
        (found,) = [text for text in get(f"{self.address}/metrics").splitlines() if text.startswith(f"{line} ")]
        return float(found.split()[-1])


@pytest.fixture(scope="module")
def served(fresh: Installed, mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Versions 1 to 3; MLflow has other bytes of 3 than were registered. Champion is 1, and two requests may wait."""
    from pipelines.commands.generate.video import generate

    client, sha256, weights = MlflowClient(mlflow_server), {}, Path()
    for number in (1, 2, 3):
        folder = tmp_path_factory.mktemp(str(number))
        packed = make_packed(folder, number, STEPS)
        version = register(client, make_wish(folder, NAME, read_folder(packed)))
        generate(packed, "a red digit three", 1, folder / "1.mp4")
        sha256[number] = hashlib.sha256((folder / "1.mp4").read_bytes()).hexdigest()
        (weights,) = (packed / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    client.log_model_artifact(version.source.removeprefix("models:/"), str(weights), "artifacts/packed/transformer")
    move_alias(client, NAME, "champion", 1, reason="the first")
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    variables = outside(fresh.venv, folder, mlflow_server) | {"QVGEN_WAITING": "2"}
    command = [str(fresh.venv / "bin" / "qvgen"), "serve-model", f"models:/{NAME}@champion"]
    command += ["--port", str(port), "--interval", str(INTERVAL)]
    address = f"http://127.0.0.1:{port}"
    with server(command, folder / "run", f"{address}/health", variables, alone=True) as process:
        yield Served(address, folder / "run" / "log", client, sha256, process)


def test_it_answers_as_mlflows_own_server_does(served: Served) -> None:
    status, answer, headers = ask(served.address)
    assert status == 200 and headers["Model-Version"] == "followed/1"
    (row,) = answer["predictions"]
    assert row["sha256"] == served.sha256[1] and row.keys() == {"video", "sha256"}
    assert (answer["model"], answer["version"]) == (NAME, 1)
    assert len({served.sha256[number] for number in (1, 2, 3)}) == 3, "the versions can be told apart"
    assert get(f"{served.address}/ping") == get(f"{served.address}/health") == "\n"


@pytest.mark.parametrize(
    ("body", "kind", "status", "said"),
    [
        (b"{", "application/json", 400, "valid JSON"),
        (b'{"dataframe_split": 5}', "application/json", 400, ""),
        (b'{"dataframe_records": [{"text": "a"}]}', "application/json", 400, "prompt"),
        (b'{"dataframe_records": [{"prompt": "a"}], "params": {"steps": "x"}}', "application/json", 400, "steps"),
        (
            b'{"dataframe_records": [{"prompt": "a"}], "params": {"steps": 999}}',
            "application/json",
            400,
            f"limit steps = {MOST_STEPS}",
        ),
        (b"{}", "text/plain", 415, "content type"),
        (b" " * (LARGEST_TEXT + 1), "application/json", 413, f"limit body = {LARGEST_TEXT} bytes"),
    ],
)
def test_what_is_wrong_is_refused(served: Served, body: bytes, kind: str, status: int, said: str) -> None:
    answer = post(served.address, body, kind)
    assert answer.status == status and said in answer.content and "Traceback" not in answer.content, answer
    assert answer.headers["Model-Version"] == f"followed/{json.loads(answer.content)['version']}"


def test_a_page_whose_name_points_here_is_not_answered(served: Served) -> None:
    assert post(served.address, b"{}", Host="evil.example").status == 400
    assert "Model-Version" not in post(served.address, b"{}", Host="evil.example").headers


def test_more_requests_than_may_wait_get_503(served: Served) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: ask(served.address, seed=seed, steps=MOST_STEPS), range(8)))
    statuses = [answer.status for answer in answers]
    assert set(statuses) == {200, 503} and statuses.count(200) >= 3, statuses
    assert all("limit waiting = 2" in answer.content for answer in answers if answer.status == 503)
    assert served.number('qvgen_requests_total{outcome="busy"}') == statuses.count(503)
    assert served.number("qvgen_video_seconds_count") >= statuses.count(200) and served.number("qvgen_queue") == 0


def test_a_request_whose_client_has_gone_gives_up_its_place(served: Served) -> None:
    """Behind two of four videos each."""
    made = served.number("qvgen_video_seconds_count")
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(post, served.address, LONG) for _ in range(2)]
        wait_until(lambda: served.number("qvgen_queue") == 2, served.log.read_text)
        client = HTTPConnection(served.address.removeprefix("http://"))
        client.request("POST", "/invocations", LONG, {"Content-Type": "application/json"})
        wait_until(lambda: served.number("qvgen_queue") == 3, served.log.read_text)
        client.close()
        wait_until(lambda: served.number('qvgen_requests_total{outcome="gone"}') == 1, served.log.read_text)
        assert [future.result().status for future in others] == [200, 200]
    assert served.number("qvgen_video_seconds_count") == made + 8 and served.number("qvgen_queue") == 0


def test_a_promotion_and_a_rollback_while_requests_run(served: Served, mlflow_server: str, tmp_path: Path) -> None:
    """No request fails, none is answered by a mixture, and nothing is restarted."""
    answers, stop = [], threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            answers.append(ask(served.address))

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(go_on) for _ in range(2)]
        try:
            wait_until(lambda: answers, served.log.read_text)
            served.promote(2)
            wait_until(lambda: answers[-1].headers["Model-Version"] == "followed/2", served.log.read_text)
            with using(mlflow_server, tmp_path):
                rollback(NAME, reason="it flickers")
            wait_until(lambda: answers[-1].headers["Model-Version"] == "followed/1", served.log.read_text)
        finally:
            stop.set()
        for future in running:
            future.result()
    assert {answer.status for answer in answers} == {200}
    for answer in answers:
        assert answer.content["predictions"][0]["sha256"] == served.sha256[answer.content["version"]]
    log = served.log.read_text()
    assert "followed/2 serves instead of followed/1" in log and "followed/1 serves instead of followed/2" in log
    assert "status=200 outcome=ok version=followed/2" in log
    assert served.number(f'qvgen_model_version{{model="{NAME}"}}') == 1


def test_a_damaged_version_is_refused_and_the_old_one_goes_on(served: Served) -> None:
    refused = 'qvgen_registry_looks_total{outcome="refused"}'
    assert served.number(refused) == 0
    served.promote(3)
    wait_until(lambda: served.number(refused) > 1, served.log.read_text)
    answer = ask(served.address)
    assert answer.status == 200 and answer.headers["Model-Version"] == "followed/1"
    assert answer.content["predictions"][0]["sha256"] == served.sha256[1]
    log = served.log.read_text()
    assert "ERROR refused followed/3" in log and "has other bytes" in log and "followed/1 goes on serving" in log
    served.promote(2)
    wait_until(lambda: served.version() == 2, served.log.read_text)


def test_without_its_alias_it_goes_on(served: Served) -> None:
    """An alias that is gone is none that it could follow."""
    served.client.delete_registered_model_alias(NAME, "champion")
    wait_until(lambda: served.number('qvgen_registry_looks_total{outcome="unreachable"}') > 0, served.log.read_text)
    assert ask(served.address).headers["Model-Version"] == "followed/2"
    assert [path.name for path in served.log.parent.iterdir()] == ["log"], "its folder may be read-only"


def test_the_end_waits_for_requests_that_were_begun(served: Served) -> None:
    """The last test: the server ends."""
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(post, served.address, LONG) for _ in range(2)]
        wait_until(lambda: served.number("qvgen_queue") == 2, served.log.read_text)
        served.process.terminate()
        assert [future.result().status for future in asked] == [200, 200]
    assert served.process.wait(60) in (0, -signal.SIGTERM)
