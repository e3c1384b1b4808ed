"""The environment of the processes of every run in this checkout, and the lock that allows one run at a time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.record.connection import spare_loopback


def environment(root: Path) -> dict[str, str]:
    """This process's variables; those of .env.defaults where they are not set; this interpreter's folder first on PATH,
    so that the stages' `python` is this one."""
    variables = dict(os.environ)
    defaults = root / ".env.defaults"
    for line in defaults.read_text().splitlines() if defaults.is_file() else ():
        name, separator, value = line.partition("=")
        if separator and not name.lstrip().startswith("#"):
            variables.setdefault(name.strip(), value.strip())
    spare_loopback(variables)
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables.get("PATH", os.defpath)])
    return variables


@contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Hold .qvgen/repro.lock; if another run holds it, say so and wait. The lock dies with its process."""
    from filelock import FileLock, Timeout

    folder = root / ".qvgen"
    folder.mkdir(exist_ok=True)
    owner = folder / "repro.pid"
    lock = FileLock(folder / "repro.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        pid = owner.read_text() if owner.exists() else "unknown"
        print(f"Another run is active (process {pid}); waiting until it ends ...", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        owner.write_text(str(os.getpid()))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def run_is_active(root: Path) -> str | None:
    """The process that holds .qvgen/repro.lock ("unknown" if it does not say), None if nothing does.

    The lock itself is asked: repro.pid outlives a process that was killed, and its number may by now be another's.
    """
    import fcntl

    folder = root / ".qvgen"
    try:
        with (folder / "repro.lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        owner = folder / "repro.pid"
        return owner.read_text().strip() if owner.is_file() else "unknown"
    return None


def check_git(root: Path) -> None:
    """Raises ValueError where DVC would refuse to work: in a folder without git, such as an unpacked ZIP file, and where
    `check_owner` does."""
    if any((folder / ".git").exists() for folder in (root, *root.parents)):
        check_owner(root)
        return
    from dvc.config import Config

    if not Config(str(root / ".dvc")).get("core", {}).get("no_scm"):
        raise ValueError(
            f"{root} is in no git repository, which DVC needs. Either `git init && git add -A && git commit -m start` "
            "(then runs name their code and `qvgen audit` can check them), or `dvc config --local core.no_scm true`"
        )


def check_owner(root: Path) -> None:
    """Raises ValueError, with git's own remedy, for a clone of another user: its configuration names programs, so git does not
    read it for you before you say that you trust it, and neither does DVC; and for a damaged index, at which DVC hangs."""
    command, plain = ["git", "-C", str(root), "ls-files", "--", "dvc.yaml"], os.environ | {"LC_ALL": "C"}
    try:
        said = subprocess.run(command, env=plain, capture_output=True, text=True, check=False).stderr
    except OSError:  # no git: whoever needs it says so
        return
    if "dubious ownership" in said:
        remedy = re.search(r"git config --global --add safe\.directory .*", said)
        add = remedy[0] if remedy else f"git config --global --add safe.directory {root}"
        raise ValueError(f"{root} belongs to another user: if you trust them, `{add}`; else use a clone of your own")
    if "index file" in said:
        raise ValueError(f"git cannot read its index in {root} ({said.strip()}): `rm .git/index && git reset` makes it anew")


def project_root() -> Path:
    """The nearest folder, from here upwards, that holds dvc.yaml and .dvc: folders of a project have a dvc.yaml too. Where
    none is under DVC, the nearest with dvc.yaml. Raises ValueError if there is none."""
    here = Path.cwd()
    found = [folder for folder in (here, *here.parents) if (folder / "dvc.yaml").is_file()]
    if found:
        return next((folder for folder in found if (folder / ".dvc").is_dir()), found[0])
    raise ValueError(f"no dvc.yaml in {here} or above: run this inside the project")
