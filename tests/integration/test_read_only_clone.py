"""A clone that cannot be written, by nobody or not by this user, can be asked, also if DVC never worked in it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import toy_project

pytestmark = [pytest.mark.integration, pytest.mark.slow]

# /var/tmp/dvc is where DVC remembers hashes, for all users: it cannot be written either.
READ_ONLY = (
    'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && mount -t tmpfs -o ro none /var/tmp && cd "$0" && exec "$@"'
)
SCRIPT = """
from pathlib import Path
from pipelines.audit.blobs import open_blobs
from pipelines.audit.project import Project, current_hash
from pipelines.commands.status import read_status

here = Path.cwd()
print(*sorted(f"{one.stage}:{one.runs}" for one in read_status(here)), sorted(Project(here).at("HEAD").outs))
with open_blobs(here) as blobs:
    print(blobs.where, current_hash(here, "raw.txt"))
"""


@pytest.fixture(scope="module")
def clone() -> Iterator[Path]:
    """Of a project, in a folder that every user can read."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.chmod(0o755)
        (place / "project").mkdir()
        toy_project.make(place / "project")
        subprocess.run(["git", "clone", "-q", str(place / "project"), str(place / "clone")], check=True)
        (place / ".gitconfig").write_text("[safe]\n\tdirectory = *\n")  # or git reads nothing that another user owns
        yield place / "clone"


def ask(prefix: list[str], clone: Path) -> None:
    """Run SCRIPT under the command `prefix`, and see that it answers and that it changed nothing."""
    variables = toy_project.environment() | {"PYTHONDONTWRITEBYTECODE": "1", "HOME": str(clone.parent)}
    before = {path: path.stat().st_mtime_ns for path in clone.rglob("*")}
    for command in (["-c", "import dvc, stages"], ["-c", SCRIPT]):
        whole = [*prefix, sys.executable, *command]
        try:
            done = subprocess.run(whole, cwd=clone, env=variables, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip(f"no {prefix[0]} found: `apt-get install util-linux`")
        if command[1] != SCRIPT and done.returncode:
            pytest.skip(f"not possible here: {done.stderr.strip()[-300:]}")
    assert done.returncode == 0, done.stderr
    assert "a:True b:True c:True d:True" in done.stdout and "'artifacts/d'" in done.stdout, done.stdout
    md5 = done.stdout.split()[-1]
    assert len(md5) == 32 and md5 in (clone / "raw.txt.dvc").read_text()
    assert {path: path.stat().st_mtime_ns for path in clone.rglob("*")} == before


def test_a_clone_that_is_mounted_read_only(clone: Path) -> None:
    assert not (clone / ".dvc" / "tmp").exists()
    ask(["unshare", "-m", "sh", "-c", READ_ONLY, str(clone)], clone)


def test_a_clone_of_another_user(clone: Path) -> None:
    """Who has worked in it, so that what DVC remembers of it in /var/tmp/dvc is theirs as well."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    code, output = toy_project.run(clone, "pipelines.cli", "status")
    assert code == 0, output
    ask(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"], clone)
