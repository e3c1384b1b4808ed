"""`qvgen doctor`: is everything set up? One line per check, and for what is wrong, what to do."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pipelines.commands.exposure import measure
from pipelines.run.checkout import environment, run_is_active
from pipelines.run.health import accepts, fetch
from pipelines.run.prefect_home import LOCAL_API, LOGIN, SECRET, answers, is_local, server_login
from stages.record.connection import public_uri, tracking_uri

Verdict = Literal["PASS", "WARN", "FAIL"]
SECONDS = 3.0  # that a server which hangs may cost
GIB = 2**30
# Packages that break something else than themselves, and what.
CRITICAL = {
    "fastapi": "newer ones: every Prefect flow and server dies",
    "sqlalchemy": "2.1: schedules silently never start a run",
    "prefect": "flows and schedules",
    "mlflow": "the record of runs",
    "dvc": "the pipeline",
    "torch": "models",
    "diffusers": "models",
}
_REPORT = "`QVGEN_DEBUG=1 qvgen doctor` shows where"
QUIET = ("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY", "DVC_NO_ANALYTICS", "HF_HUB_DISABLE_TELEMETRY")


@dataclass(frozen=True)
class Finding:
    name: str
    verdict: Verdict
    detail: str
    remedy: str = ""


def examine(root: Path) -> list[Finding]:
    """All checks; one that cannot be made is a failure of its own and does not stop the others."""
    found: list[Finding] = []
    checks: tuple[Callable[[Path], Iterator[Finding]], ...] = (
        _python, _packages, _project, _telemetry, _tracking, _journals, _prefect, _locks, _exposed, _room, _leftovers, _kernels
    )  # fmt: skip
    for check in checks:
        try:
            found += check(root)
        except Exception as error:
            if os.environ.get("QVGEN_DEBUG") == "1":
                raise
            found.append(
                Finding(check.__name__.strip("_"), "FAIL", f"cannot be checked: {type(error).__name__}: {error}", _REPORT)
            )
    return found


def show(checks: list[Finding]) -> None:
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.verdict}  {check.name:<{width}}  {check.detail}")
        if check.verdict != "PASS" and check.remedy:
            print(f"      {'':<{width}}  -> {check.remedy}")


def _python(root: Path) -> Iterator[Finding]:
    enough = sys.version_info >= (3, 11)
    yield Finding("python", "PASS" if enough else "FAIL", sys.version.split()[0], "use Python 3.11 or newer")


def _packages(root: Path) -> Iterator[Finding]:
    file = root / "constraints.txt"
    pins = dict(re.findall(r"^([\w.\-]+)==(\S+)", file.read_text() if file.is_file() else "", re.MULTILINE))
    pins = {name.lower(): value for name, value in pins.items()}
    for name, matters in CRITICAL.items():
        remedy = f"pip install -c constraints.txt {name}  ({matters})"
        try:
            installed = version(name)
        except PackageNotFoundError:
            yield Finding(f"package {name}", "FAIL", "is not installed", remedy)
            continue
        tried = pins.get(name)
        same = tried is None or installed.partition("+")[0] == tried.partition("+")[0]
        broken = name in ("fastapi", "sqlalchemy") and _newer(installed, {"fastapi": "0.151", "sqlalchemy": "2.1"}[name])
        verdict: Verdict = "FAIL" if broken else "PASS" if same else "WARN"
        yield Finding(f"package {name}", verdict, installed if same else f"{installed}; tried: {tried}", remedy)
    different = sorted(name for name, pin in pins.items() if name not in CRITICAL and _installed(name) not in (None, pin))
    detail = f"other versions than tried: {', '.join(different)}" if different else "as in constraints.txt"
    yield Finding("other packages", "WARN" if different else "PASS", detail, "pip install -c constraints.txt -e '.[dev]'")


def _installed(name: str) -> str | None:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def _newer(installed: str, limit: str) -> bool:
    def numbers(text: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", text)[:2]]

    return numbers(installed) >= numbers(limit)


def _project(root: Path) -> Iterator[Finding]:
    git = any((folder / ".git").exists() for folder in (root, *root.parents))
    detail = str(root) if git else f"{root} is in no git repository"
    yield Finding("git", "PASS" if git else "FAIL", detail, "git clone or git init: without commits nothing can be audited")
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    try:
        project = Repo(str(root))
    except NotDvcRepoError:
        yield Finding("dvc", "FAIL", f"{root} is no DVC project", "dvc init, or git clone the project again")
        return
    with project as repo:
        yield Finding("dvc", "PASS", f"{len(repo.index.stages)} stages")
        remote = repo.config["core"].get("remote")
        detail = str(remote) if remote else "no default remote: data and models are on this machine only"
        yield Finding("dvc remote", "PASS" if remote else "WARN", detail, "dvc remote add -d NAME ADDRESS, then dvc push")


def _telemetry(root: Path) -> Iterator[Finding]:
    variables = environment(root)
    loud = [name for name in QUIET if variables.get(name, "").lower() not in ("1", "true")]
    if variables.get("PREFECT_SERVER_ANALYTICS_ENABLED", "").lower() not in ("false", "0"):
        loud.append("PREFECT_SERVER_ANALYTICS_ENABLED")
    remedy = "restore .env.defaults, or set them in the environment"
    yield Finding("telemetry", "WARN" if loud else "PASS", f"not switched off: {', '.join(loud)}" if loud else "off", remedy)


def _tracking(root: Path) -> Iterator[Finding]:
    uri = tracking_uri(root)
    shown = public_uri(uri, root)
    if uri.startswith("http"):
        up = fetch(f"{uri.rstrip('/')}/health", SECONDS) is not None
    elif uri.startswith("sqlite"):
        yield _database(Path(uri.partition("?")[0].removeprefix("sqlite:///")), shown)
        return
    else:
        reachable = _reachable(uri)
        if reachable is None:
            yield Finding("mlflow", "WARN", f"{shown}: not checked", "`mlflow experiments search` shows whether it works")
            return
        up = reachable
    remedy = "start the server; runs wait in .qvgen/journal and `qvgen lineage sync` sends them"
    yield Finding("mlflow", "PASS" if up else "FAIL", f"{shown} {'answers' if up else 'does not answer'}", remedy)


def _database(file: Path, shown: str) -> Finding:
    """Only reads: MLflow's own client would create or migrate the tables of what it is given."""
    import sqlite3
    from contextlib import closing
    from importlib.util import find_spec

    from alembic.script import ScriptDirectory

    if not file.exists():
        return Finding("mlflow", "PASS", f"{shown}, made by the first run")
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=SECONDS)) as database:
            revisions = [row[0] for row in database.execute("select version_num from alembic_version")]
    except sqlite3.Error as error:
        return Finding(
            "mlflow", "FAIL", f"{shown} is no MLflow database: {error}", "move the file away: the next run makes one"
        )
    spec = find_spec("mlflow")  # where it is, without the seconds that importing it takes
    assert spec is not None and spec.submodule_search_locations
    scripts = Path(spec.submodule_search_locations[0]) / "store" / "db_migrations"
    current = ScriptDirectory(str(scripts)).get_heads()
    if revisions != current:
        detail = f"{shown} has schema {', '.join(revisions) or 'none'}; this MLflow needs {', '.join(current)}"
        return Finding("mlflow", "FAIL", detail, "copy the file, then: mlflow db upgrade ADDRESS")
    return Finding("mlflow", "PASS", f"{shown}, schema is current")


def _reachable(uri: str) -> bool | None:
    """Whether the database server accepts connections; None if the address does not say where it is."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(uri)
        port = parts.port or {"postgresql": 5432, "mysql": 3306, "mssql": 1433}.get(parts.scheme.partition("+")[0])
    except ValueError:  # its text could hold a part of the password
        return None
    if not parts.hostname or not port:
        return None
    return accepts(parts.hostname, port, SECONDS)


def _journals(root: Path) -> Iterator[Finding]:
    from stages.record.outbox import unsent_journals

    count = len(unsent_journals(root))
    detail = f"{count} runs have not reached MLflow" if count else "all runs have reached MLflow"
    yield Finding("journals", "WARN" if count else "PASS", detail, "qvgen lineage sync")


def _prefect(root: Path) -> Iterator[Finding]:
    api = os.environ.get("PREFECT_API_URL", LOCAL_API)
    login = os.environ.get(LOGIN) or (server_login(root) if is_local(api) and (root / SECRET).exists() else None)
    up = answers(api, SECONDS, login)
    state = "answers" if up else "does not answer: flows start a temporary server, schedules need this one"
    detail = f"{public_uri(api, root)} {state}"
    yield Finding("prefect", "PASS" if up else "WARN", detail, "qvgen ui, or set PREFECT_API_URL")


def _locks(root: Path) -> Iterator[Finding]:
    import json

    import psutil

    holder = run_is_active(root)
    yield Finding("running", "PASS", f"process {holder} holds .qvgen/repro.lock" if holder else "nothing")
    file = root / ".dvc" / "tmp" / "rwlock"
    held = json.loads(file.read_text() or "{}") if file.is_file() else {}
    entries = [
        entry for kinds in held.values() for kind in kinds.values() for entry in (kind if isinstance(kind, list) else [kind])
    ]
    dead = sorted({entry["pid"] for entry in entries if entry and not psutil.pid_exists(entry["pid"])})
    detail = f"of dead processes: {', '.join(map(str, dead))}" if dead else "none is stale"
    yield Finding("dvc locks", "WARN" if dead else "PASS", detail, "nothing: DVC removes them at its next run")


def _exposed(root: Path) -> Iterator[Finding]:
    import psutil

    try:
        listening = [c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr]
    except psutil.AccessDenied:
        yield Finding("exposed", "WARN", "cannot be seen without more rights")
        return
    found = [f"{ip}:{port}" for ip, port in listening if port in (4200, 5000) and ip not in ("127.0.0.1", "::1")]
    detail = f"anybody in the network can reach {', '.join(found)}" if found else "no server listens beyond this machine"
    yield Finding("exposed", "WARN" if found else "PASS", detail, "start it with --host 127.0.0.1, or put a proxy before it")
    servers = measure(root, SECONDS)
    for server in servers:
        # Whoever can use Prefect's API can run commands; MLflow's is of use to read and write runs.
        bad = server.to_web_pages, server.to_this_machine and server.kind == "Prefect"
        verdict: Verdict = "FAIL" if bad[0] else "WARN" if bad[1] else "PASS"
        remedy = "stop it and start `qvgen ui`, or close it as docs/security.md says"
        yield Finding(f"exposed {server.where}", verdict, str(server), remedy)
    if not servers:
        yield Finding("exposed servers", "PASS", "none of this project's servers runs")


def _room(root: Path) -> Iterator[Finding]:
    import psutil

    free = shutil.disk_usage(root).free / GIB
    verdict: Verdict = "FAIL" if free < 1 else "WARN" if free < 5 else "PASS"
    yield Finding("disk", verdict, f"{free:.1f} GiB free", "dvc gc --workspace, or a larger disk")
    memory = psutil.virtual_memory().available / GIB
    yield Finding("memory", "WARN" if memory < 2 else "PASS", f"{memory:.1f} GiB available", "close other programs")


def _leftovers(root: Path) -> Iterator[Finding]:
    found = sorted((root / "artifacts").rglob(".*.tmp"))
    detail = f"{len(found)} files of a copy that was cut short, such as {found[0].relative_to(root)}" if found else "none"
    remedy = "if nothing runs: find artifacts -name '.*.tmp' -delete"
    yield Finding("leftovers", "WARN" if found else "PASS", detail, remedy)


def _kernels(root: Path) -> Iterator[Finding]:
    from pipelines.commands.kernels import instruction_sets

    used = instruction_sets()["used"]
    remedy = "install a C++ compiler and cmake, then pip install -e . again; `qvgen kernels` says why"
    yield Finding("kernels", "PASS" if used else "WARN", used or "reference only: packed layers are slow", remedy)
