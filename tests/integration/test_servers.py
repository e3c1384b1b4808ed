"""Servers that no web page can command: Prefect and MLflow as `qvgen ui` starts them, asked as an attacker would."""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.commands import doctor, exposure
from pipelines.run.prefect_home import answers, server_login
from tests.support import services, toy_project
from tests.support.toy_project import processes_in, run, start

pytestmark = [pytest.mark.integration, pytest.mark.slow]

FLOW = {"name": "x"}
# Each changes something, or would.
PREFECT = [("POST", "/api/flows/", FLOW), ("PATCH", "/api/deployments/{id}", {}), ("DELETE", "/api/flows/{id}", None)]
PREFECT += [("POST", "/api/flows/filter", {}), ("GET", "/api/admin/version", None)]
MLFLOW = [("POST", "/api/2.0/mlflow/experiments/create", FLOW), ("POST", "/ajax-api/2.0/mlflow/experiments/create", FLOW)]
NOBODY = "00000000-0000-0000-0000-000000000000"


class Servers:
    def __init__(self, project: Path, ports: tuple[int, int], lines: list[str]) -> None:
        self.project, self.mlflow, self.prefect, self.lines = project, *ports, lines
        self.login = (project / ".qvgen" / "prefect.secret").read_text().strip()

    def ask(
        self, port: int, method: str, path: str, body: Any = None, login: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        if login:
            headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
        content = None if body is None else json.dumps(body)
        connection.request(method, path.format(id=NOBODY), content, {"Content-Type": "application/json"} | headers)
        reply = connection.getresponse()
        reply.read()
        connection.close()
        return reply.status, {name.lower(): value for name, value in reply.getheaders()}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """`qvgen ui` in a project with a recorded run."""
    project = toy_project.make(tmp_path_factory.mktemp("project"))
    assert run(project, "dvc", "repro", "a")[0] == 0
    ports = services.free_port(), services.free_port()
    options = ("--no-browser", "--mlflow-port", str(ports[0]), "--prefect-port", str(ports[1]))
    process = start(project, "pipelines.cli", "ui", *options)
    try:
        assert process.stdout is not None
        yield Servers(project, ports, [process.stdout.readline() for _ in range(2)])
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


@pytest.mark.parametrize(("method", "path", "body"), PREFECT)
def test_prefect_refuses_what_is_not_its_own(servers: Servers, method: str, path: str, body: Any) -> None:
    port, login = servers.prefect, servers.login
    assert servers.ask(port, method, path, body)[0] == 401
    assert servers.ask(port, method, path, body, "qvgen:guessed")[0] == 401
    foreign = {"Origin": "https://example.com"}, {"Origin": "null"}, {"Origin": f"http://127.0.0.1:{servers.mlflow}"}
    for headers in (*foreign, {"Host": "rebound.example.com"}, {"Host": f"rebound.example.com:{port}"}, {"Host": ""}):
        code, reply = servers.ask(port, method, path, body, login, **headers)  # even with the login
        assert code == 403 and "access-control-allow-origin" not in reply, headers
    for own in ({}, {"Origin": f"http://127.0.0.1:{port}"}, {"Host": f"localhost:{port}"}):
        assert servers.ask(port, method, path, body, login, **own)[0] in (200, 201, 204, 404), own


def test_a_foreign_page_is_promised_nothing_before_it_asks(servers: Servers) -> None:
    headers = {"Access-Control-Request-Method": "DELETE", "Origin": "https://example.com"}
    code, reply = servers.ask(servers.prefect, "OPTIONS", "/api/flows/x", **headers)
    assert code == 403 and "access-control-allow-origin" not in reply
    own = headers | {"Origin": f"http://127.0.0.1:{servers.prefect}"}
    code, reply = servers.ask(servers.prefect, "OPTIONS", "/api/flows/x", **own)
    assert (code, reply["access-control-allow-origin"]) == (200, own["Origin"])
    _, reply = servers.ask(servers.prefect, "GET", "/")
    assert reply["x-frame-options"] == "DENY"


@pytest.mark.parametrize(("method", "path", "body"), MLFLOW)
def test_mlflow_refuses_foreign_pages_and_names(servers: Servers, method: str, path: str, body: Any) -> None:
    port = servers.mlflow
    hosts = f"rebound.example.com:{port}", f"10.example.com:{port}", "192.168.example.com"
    for headers in ({"Origin": "https://example.com"}, *({"Host": host} for host in hosts)):
        code, reply = servers.ask(port, method, path, body, **headers)
        assert code == 403 and reply.get("access-control-allow-origin") in (None, ""), headers


def test_events_are_for_those_with_a_login(servers: Servers) -> None:
    from websockets.exceptions import ConnectionClosed, InvalidStatus
    from websockets.sync.client import connect
    from websockets.typing import Origin, Subprotocol

    address = f"ws://127.0.0.1:{servers.prefect}/api/events/out"
    with pytest.raises(InvalidStatus), connect(address, origin=Origin("https://example.com"), proxy=None):
        pass
    with connect(address, subprotocols=[Subprotocol("prefect")], proxy=None) as socket:
        socket.send(json.dumps({"type": "auth", "token": "guessed"}))
        with pytest.raises(ConnectionClosed):
            while True:
                assert json.loads(socket.recv(timeout=30))["type"] != "auth_success"


def test_the_link_logs_a_browser_in(servers: Servers) -> None:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium found: `apt-get install chromium`, or .ci/programs as root")
    link = servers.lines[1].removeprefix("Prefect: ").strip()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=("--no-sandbox", "--disable-gpu"))
        page = browser.new_page()
        with page.expect_response(lambda reply: "/api/" in reply.url and reply.request.method == "POST") as found:
            page.goto(link)
        assert found.value.status == 200
        assert "#" not in page.url and "login" not in page.url
        browser.close()


def test_flow_and_doctor_work_and_the_secret_stays_where_it_is(servers: Servers) -> None:
    project, login = servers.project, servers.login
    secret = project / ".qvgen" / "prefect.secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600 and len(login) > 40
    api = f"http://127.0.0.1:{servers.prefect}/api"
    assert answers(api, 5, login) and not answers(api, 5, "qvgen:guessed")
    # As with the server on 4200: PREFECT_API_URL says where, the project's file says the login.
    code, output = run(project, "pipelines.cli", "repro", "d", PREFECT_API_URL=api)
    assert code == 0 and login not in output, output
    assert (project / "artifacts" / "d" / "value").read_text() == "d 0"

    found = {entry.kind: entry for entry in exposure.measure(project, 5)}
    assert (found["Prefect"].foreign_page, found["Prefect"].foreign_name, found["Prefect"].no_login) == (403, 403, 401)
    assert (found["MLflow"].foreign_page, found["MLflow"].foreign_name, found["MLflow"].no_login) == (403, 403, 200)
    checks = [check for check in doctor._exposed(project) if check.name.endswith(f":{servers.prefect}")]
    assert [check.verdict for check in checks] == ["PASS"], checks

    password = login.partition(":")[2]
    assert not [line for line in processes_in(project) if password in line]
    holders = [path for path in project.rglob("*") if path.is_file() and password.encode() in path.read_bytes()]
    assert holders == [secret]
    secret.chmod(0o644)
    with pytest.raises(ValueError, match="can be read by others"):
        server_login(project)
    secret.chmod(0o600)


def test_doctor_finds_a_server_without_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with services.prefect(tmp_path / "prefect", f"sqlite+aiosqlite:///{tmp_path}/prefect.db") as variables:
        monkeypatch.setenv("PREFECT_API_URL", variables["PREFECT_API_URL"])
        port = variables["PREFECT_API_URL"].split(":")[2].partition("/")[0]
        (found,) = (check for check in doctor._exposed(tmp_path) if check.name == f"exposed 127.0.0.1:{port}")
        assert found.verdict == "FAIL" and "a page of another site is answered (200)" in found.detail


def test_the_temporary_server_asks_for_the_login(tmp_path: Path) -> None:
    """While `qvgen repro` runs, which starts one."""
    project = toy_project.make(tmp_path)
    (project / "ask").write_text("hang a")
    process = start(project, "pipelines.cli", "repro", "a")
    try:
        toy_project.wait_until((project / "started").exists)
        ours = {address.removeprefix("http://") for address in exposure._listening(project)}
        (found,) = (entry for entry in exposure.measure(project, 5) if entry.where in ours)
        assert (found.kind, found.foreign_page, found.foreign_name, found.no_login) == ("Prefect", 403, 403, 401)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)


def test_a_foreign_pipeline_is_not_retrained(servers: Servers, tmp_path: Path) -> None:
    """What a run parameter names is not executed: the flow runs where it is served, or not at all."""
    other = tmp_path / "dvc.yaml"
    other.write_text(f"stages: {{x: {{cmd: touch {tmp_path}/ran, always_changed: true}}}}\n")
    script = f"from pipelines.run.retrain import retrain\nretrain({str(tmp_path)!r}, force=True)\n"
    (servers.project / "run_flow.py").write_text(script)
    variables = {"PREFECT_API_URL": f"http://127.0.0.1:{servers.prefect}/api", "PREFECT_API_AUTH_STRING": servers.login}
    code, output = run(servers.project, "run_flow", **variables)
    assert code != 0 and "this process retrains" in output and not (tmp_path / "ran").exists(), output


def test_a_worker_needs_the_login(servers: Servers) -> None:
    """`prefect deploy` and `prefect worker` take it from the environment, and run nothing without it."""
    project = servers.project
    (project / "flows.py").write_text("from prefect import flow\n\n@flow\ndef hello():\n    print('hello')\n")
    api = {"PREFECT_API_URL": f"http://127.0.0.1:{servers.prefect}/api", "PREFECT_HOME": str(project / ".qvgen" / "prefect")}
    create = ("prefect", "--no-prompt", "work-pool", "create", "qvgen", "--type", "process")
    code, output = run(project, *create, **api)
    assert code != 0 and "401" in output, output
    ours = api | {"PREFECT_API_AUTH_STRING": servers.login}
    assert run(project, *create, **ours)[0] == 0
    deploy = ("prefect", "--no-prompt", "deploy", "flows.py:hello", "-n", "x", "-p", "qvgen")
    code, output = run(project, *deploy, **ours)
    assert code == 0, output
    assert run(project, "prefect", "deployment", "run", "hello/x", **ours)[0] == 0
    worker = ("prefect", "worker", "start", "--pool", "qvgen", "--run-once")
    code, output = run(project, *worker, **ours)
    assert code == 0 and "Completed" in output and servers.login not in output, output
