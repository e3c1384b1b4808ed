"""Real servers for tests, each a process of its own on 127.0.0.1: PostgreSQL, an S3 API, MLflow, Prefect."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.toy_project import wait_until

PASSWORD = "correct-horse"  # of these servers, for the length of a test


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def answers(address: str) -> bool:
    """Whether anything speaks HTTP there; a refusal is an answer too."""
    try:
        with urllib.request.urlopen(address, timeout=2):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


@contextmanager
def server(
    command: list[str], folder: Path, address: str, variables: Mapping[str, str] | None = None, alone: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ready once `address` answers, and ends with its whole group. `alone`: it has these `variables` and
    none of the tests'."""
    folder.mkdir(parents=True, exist_ok=True)
    log, environment = folder / "log", ({} if alone else os.environ) | dict(variables or {})
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        wait_until(lambda: answers(address) or process.poll() is not None, log.read_text)
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass
class Postgres:
    """A PostgreSQL server with one user, qvgen, in a folder of its own."""

    folder: Path
    port: int
    programs: Path
    user: str | None  # it refuses to run as root

    def uri(self, database: str, driver: str = "postgresql") -> str:
        return f"{driver}://qvgen:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def run(self, program: str, *arguments: str) -> None:
        command = [str(self.programs / program), "-D", str(self.folder / "data"), *arguments]
        log = self.folder / "log"
        with log.open("a") as file:
            done = subprocess.run(command, cwd=self.folder, user=self.user, stdout=file, stderr=file, check=False)
        assert done.returncode == 0, log.read_text()

    def start(self) -> None:
        options = f"-h 127.0.0.1 -p {self.port} -k {self.folder}"
        self.run("pg_ctl", "start", "-w", "-l", str(self.folder / "server.log"), "-o", options)

    def kill(self) -> None:
        """As `kill -9` of every process would leave it: no shutdown, no checkpoint."""
        self.run("pg_ctl", "stop", "-m", "immediate", "-w")

    def query(self, database: str, sql: str) -> list[Any]:
        import psycopg2

        connection = psycopg2.connect(self.uri(database))
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                cursor.execute(sql)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()


def _postgres_programs() -> Path | None:
    if found := shutil.which("pg_ctl"):
        return Path(found).parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None, key=lambda path: int(path.parent.name))


@contextmanager
def postgres(*databases: str) -> Iterator[Postgres]:
    """Skips the test, with the reason, where PostgreSQL is not installed."""
    programs = _postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL found: `apt-get install postgresql`, or .ci/programs as root")
    user = None if os.geteuid() else "nobody"
    # Not under pytest's folder, which only its owner may enter. A socket's path is short.
    folder = Path(tempfile.mkdtemp(prefix="qvgen-pg-"))
    found = Postgres(folder, free_port(), programs, user)
    try:
        (folder / "password").write_text(PASSWORD)
        if user:
            for path in (folder, folder / "password"):
                os.chown(path, pwd.getpwnam(user).pw_uid, -1)
        found.run("initdb", "-U", "qvgen", "-A", "scram-sha-256", f"--pwfile={folder / 'password'}", "-E", "UTF8")
        found.start()
        for database in databases:
            found.query("postgres", f"CREATE DATABASE {database}")
        yield found
    finally:
        subprocess.run(
            [programs / "pg_ctl", "-D", folder / "data", "stop", "-m", "immediate"],
            user=user,
            capture_output=True,
            check=False,
        )
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def s3(folder: Path, *buckets: str) -> Iterator[dict[str, str]]:
    """Variables with which boto3, DVC and MLflow reach an S3 API over HTTP."""
    import boto3

    address = f"http://127.0.0.1:{(port := free_port())}"
    keys = {"AWS_ACCESS_KEY_ID": "qvgen", "AWS_SECRET_ACCESS_KEY": PASSWORD, "AWS_DEFAULT_REGION": "us-east-1"}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with server(command, folder, address):
        client = boto3.client(
            "s3",
            endpoint_url=address,
            aws_access_key_id="qvgen",
            aws_secret_access_key=PASSWORD,
            region_name="us-east-1",
        )
        for bucket in buckets:
            client.create_bucket(Bucket=bucket)
        yield keys | {"AWS_ENDPOINT_URL": address, "MLFLOW_S3_ENDPOINT_URL": address}


@contextmanager
def mlflow(folder: Path, store: str, artifacts: str, variables: Mapping[str, str]) -> Iterator[str]:
    """Address of an `mlflow server` that keeps runs in `store` and serves files from `artifacts` itself."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", artifacts]
    own = {"MLFLOW_BACKEND_STORE_URI": store}  # not on the command line, where every user of the host would see the password
    with server(command, folder, f"{address}/health", {**variables, **own}):
        yield address


@contextmanager
def prefect(folder: Path, database: str, login: str | None = None) -> Iterator[dict[str, str]]:
    """Variables with which flows reach a Prefect server, as a team starts it, that keeps everything in `database`."""
    port = free_port()
    variables = {
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    own = {"PREFECT_API_DATABASE_CONNECTION_URL": database}  # of the server alone: flows need no database
    if login:
        own["PREFECT_SERVER_API_AUTH_STRING"] = variables["PREFECT_API_AUTH_STRING"] = login
    with server(command, folder, f"{variables['PREFECT_API_URL']}/health", variables | own):
        yield variables
