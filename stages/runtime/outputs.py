"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_whole(final: Path) -> Iterator[Path]:
    """Write beside `final`, and move there when the block ends without an error.

    Yields an empty folder, or where `final` has a suffix the path of a file to create. Whatever goes wrong (an error,
    Ctrl-C, a full disk, a kill) the old `final` stays whole; what was written is deleted, after a kill by the next run.
    Only one process at a time may write to `final`. Raises ValueError if the block wrote nothing.
    """
    new = final.with_name(f".{final.stem}-new{final.suffix}")
    old = final.with_name(f".{final.stem}-old{final.suffix}")
    final.parent.mkdir(parents=True, exist_ok=True)
    _recover(final, new, old)
    if not final.suffix:
        new.mkdir()
    try:
        yield new
        if not new.exists() or (new.is_dir() and not any(new.iterdir())):
            raise ValueError(f"nothing was written to {final}")
        _flush(new)
        if final.is_dir():  # a folder cannot replace a folder that holds files: step aside first
            final.rename(old)
        new.replace(final)
    finally:
        _recover(final, new, old)


def _recover(final: Path, new: Path, old: Path) -> None:
    """Undo what an interrupted write left: no half-written output, and the old one in its place."""
    if old.exists() and not final.exists():
        old.rename(final)
    for leftover in (new, old):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until the bytes are on the disk: some file systems report "no space left" only then."""
    for file in [path] if path.is_file() else (p for p in path.rglob("*") if p.is_file()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
