"""The user's cache of models where it cannot be written."""

import errno
from pathlib import Path
from typing import IO

import pytest

from qvgen.hub.store import keep
from qvgen.models.hashes import hash_files


def test_a_cache_that_cannot_be_written_is_named_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"a")
    files = {"a": hash_files(tmp_path, ["a"])["a"].sha256}

    def full(path: str, out: IO[bytes]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(path: str, out: IO[bytes]) -> None:
        out.write(b"a")

    monkeypatch.setenv("QVGEN_CACHE", str(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"a/models cannot be written .*set QVGEN_CACHE"):
        keep(files, full)
    monkeypatch.setenv("QVGEN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"part/a cannot be written .*No space left.*free some room, or set QVGEN_CACHE"):
        keep(files, full)
    folder = keep(files, write)
    lock = folder.with_suffix(".lock")
    lock.unlink(missing_ok=True)
    lock.mkdir()  # which root cannot write either
    assert keep(files, full) == folder and (folder / "a").read_bytes() == b"a"
