"""Outputs appear whole or not at all, whatever happens while they are written."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from stages.runtime.outputs import write_whole

ROOT = Path(__file__).parents[3]
PATHS = pytest.mark.parametrize("path", ["artifacts/qat", "metrics/qat.json"])


@pytest.fixture
def final(tmp_path: Path, path: str) -> Path:
    return tmp_path / path


def inside(place: Path) -> Path:
    """The file to write: the output itself, or one in the output folder."""
    return place if place.suffix else place / "file"


def write(final: Path, text: str) -> None:
    with write_whole(final) as new:
        inside(new).write_text(text)


def only_content(final: Path) -> str:
    assert sorted(final.parent.iterdir()) == [final], "something was left beside the output"
    return inside(final).read_text()


@PATHS
def test_a_new_output_replaces_the_old_one_at_the_end(final: Path) -> None:
    write(final, "old")
    assert only_content(final) == "old"
    with write_whole(final) as new:
        inside(new).write_text("new")
        assert inside(final).read_text() == "old"
    assert only_content(final) == "new"


@PATHS
def test_a_file_keeps_its_suffix_while_it_is_written(final: Path) -> None:
    """Libraries choose a format by it."""
    with write_whole(final) as new:
        assert new.suffix == final.suffix
        inside(new).touch()


@PATHS
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_keeps_the_old_output(final: Path, error: type[BaseException]) -> None:
    write(final, "old")
    with pytest.raises(error), write_whole(final) as new:
        inside(new).write_text("half")
        raise error
    assert only_content(final) == "old"


@PATHS
def test_a_failure_of_the_first_run_leaves_nothing(final: Path) -> None:
    with pytest.raises(ValueError), write_whole(final) as new:
        inside(new).write_text("half")
        raise ValueError
    assert list(final.parent.iterdir()) == []


@PATHS
def test_writing_nothing_is_an_error(final: Path) -> None:
    write(final, "old")
    with pytest.raises(ValueError, match="nothing was written"), write_whole(final):
        pass
    assert only_content(final) == "old"


@PATHS
def test_a_failed_move_keeps_the_old_output(final: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError("the disk is gone")

    write(final, "old")
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        write(final, "new")
    assert only_content(final) == "old"


def test_a_kill_between_the_two_moves_is_mended_by_the_next_run(tmp_path: Path) -> None:
    final = tmp_path / "artifacts" / "qat"
    write(final, "old")
    final.rename(final.with_name(".qat-old"))
    final.with_name(".qat-new").mkdir()
    with pytest.raises(ValueError), write_whole(final):
        raise ValueError
    assert only_content(final) == "old"


# In processes of their own: a small output, then one that does not fit.
WRITER = """
import sys
from pathlib import Path
from stages.runtime.outputs import write_whole
for size in (1000, 10_000_000):
    with write_whole(Path(sys.argv[1])) as new:
        (new if new.suffix else new / "file").write_bytes(b"x" * size)
        if size > 1000 and "wait" in sys.argv:
            print("written", flush=True)
            sys.stdin.read()
"""


def start_writer(final: Path, *arguments: str, prefix: tuple[str, ...] = (), **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", WRITER, str(final), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


@PATHS
def test_a_kill_keeps_the_old_output(final: Path) -> None:
    writer = start_writer(final, "wait")
    assert writer.stdout and writer.stdout.readline() == "written\n"
    writer.kill()
    writer.communicate()
    assert inside(final).read_text() == "x" * 1000
    with pytest.raises(ValueError), write_whole(final):
        raise ValueError
    assert only_content(final) == "x" * 1000


@PATHS
def test_a_file_size_limit_keeps_the_old_output(final: Path) -> None:
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    output, _ = start_writer(final, preexec_fn=limit).communicate()
    assert "File too large" in output
    assert only_content(final) == "x" * 1000


@PATHS
def test_a_full_disk_keeps_the_old_output(final: Path, tmp_path: Path) -> None:
    """On a real file system of 256 KiB, mounted where only this process sees it."""
    in_namespace = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
    mount = f"mount -t tmpfs -o size=256k tmpfs {tmp_path}"
    try:
        subprocess.run([*in_namespace, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system lets no user mount a tmpfs")
    script = f'{mount} && ("$@"; ls -A {final.parent}; wc -c < {inside(final)})'
    output, _ = start_writer(final, prefix=(*in_namespace, script, "sh")).communicate()
    assert "No space left on device" in output
    assert output.split()[-2:] == [final.name, "1000"], "the old output, alone and whole"
