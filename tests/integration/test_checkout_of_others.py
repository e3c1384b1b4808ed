"""A checkout that was copied, that cannot be written, or that belongs to another user: nothing goes into the original, and
reading needs no permission, or says which."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.record.connection import connect
from tests.support import audited_project as toy
from tests.support.audited_project import failed

pytestmark = [pytest.mark.integration, pytest.mark.slow]

READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && cd "$0" && exec "$@"'


@pytest.fixture(scope="module", autouse=True)
def _embedded_tracking() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_copied_checkout_reads_and_writes_its_own_files(
    champion: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = files(champion / "mlruns")
    root = tmp_path / "a copy"  # an address has no spaces
    shutil.copytree(champion, root, symlinks=True)
    client, experiment = connect(root)
    assert "was made in another folder: " in capfd.readouterr().err
    assert client.get_experiment(experiment).artifact_location == (root / "mlruns").as_uri()
    for path in (root / "mlruns").rglob("table.md"):
        path.write_text("changed here")
    assert failed(root).keys() == {"seal"}, "it reads its own files"
    run = client.create_run(experiment)
    client.log_text(run.info.run_id, "x", "x.txt")
    assert list((root / "mlruns").rglob("x.txt")) and files(champion / "mlruns") == before
    connect(root)
    assert capfd.readouterr().err == "", "once"


@pytest.fixture
def read_only(champion: Path, tmp_path: Path) -> Path:
    """Root may write everywhere, so the folder is mounted read-only, which only root can."""
    root = toy.copy(champion, tmp_path / "project")
    try:
        done = subprocess.run(["unshare", "-m", "sh", "-c", READ_ONLY, str(root), "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare found: `apt-get install util-linux`")
    if done.returncode:
        pytest.skip(f"this user cannot mount: {done.stderr.strip()}")
    return root


def run(root: Path, *command: str, **variables: str) -> tuple[int, str]:
    """A `qvgen` command in the folder, mounted read-only for it."""
    mounted = ["unshare", "-m", "sh", "-c", READ_ONLY, str(root)]
    return toy.run(root, *mounted, sys.executable, "-m", "pipelines.cli", *command, **variables)


def test_reading_needs_no_checkout_that_can_be_written(read_only: Path) -> None:
    before = files(read_only)
    code, output = run(read_only, "audit", "qvgen@champion")
    assert code == 0 and "checks pass" in output, output
    code, output = run(read_only, "status", "--json")
    assert code == 0 and [x["reasons"] for x in json.loads(output.splitlines()[-1]) if x["runs"]] == [["runs every time"]], (
        output
    )
    code, output = run(read_only, "lineage", "sync")
    assert (code, output.strip()) == (0, "0 runs sent, 0 left"), output
    code, output = run(read_only, "promote")
    assert code == 1 and "mlflow.db cannot be written: use a checkout of your own" in output, output
    assert "Traceback" not in output and files(read_only) == before


def test_promote_writes_to_the_registry_only(read_only: Path, tmp_path: Path) -> None:
    """The registry may be elsewhere; what the checkout should have kept is said."""
    store = f"sqlite:///{shutil.move(read_only / 'mlflow.db', tmp_path / 'mlflow.db')}"
    (read_only / "metrics/seal.jsonl").write_text("")  # so that the promotion is still to be sealed
    code, output = run(read_only, "promote", MLFLOW_TRACKING_URI=store)
    assert code == 0 and "is champion already" in output and "Traceback" not in output, output
    assert "the promotion is not sealed in metrics/seal.jsonl" in output


def test_mlflow_opens_the_experiment_as_model_training(champion: Path, tmp_path: Path) -> None:
    root = toy.copy(champion, tmp_path / "project")
    client, experiment = connect(root)
    assert client.get_experiment(experiment).tags["mlflow.experimentKind"] == "custom_model_development"
    client.delete_experiment_tag(experiment, "mlflow.experimentKind")  # as an earlier version left it
    client, experiment = connect(root)
    assert client.get_experiment(experiment).tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_clone_of_another_user_says_how_to_trust_it(champion: Path, tmp_path: Path) -> None:
    """As git does; then the command that the message gives."""
    if os.geteuid():
        pytest.skip("only root can give files to another user")
    root = toy.copy(champion, tmp_path / "of another")
    for path in (root, *root.rglob("*")):
        os.chown(path, pwd.getpwnam("nobody").pw_uid, -1, follow_symlinks=False)
    (tmp_path / "home").mkdir()
    own = {"HOME": str(tmp_path / "home"), "XDG_CONFIG_HOME": str(tmp_path / "home")}
    code, output = toy.run(root, "qvgen", "audit", "qvgen@champion", **own)
    assert code == 1 and f"{root} belongs to another user" in output and "Traceback" not in output, output
    (command,) = re.findall(r"`(git config .*?)`", output)
    assert toy.run(root, "sh", "-c", command, **own)[0] == 0
    code, output = toy.run(root, "qvgen", "audit", "qvgen@champion", **own)
    assert code == 0 and "checks pass" in output, output
