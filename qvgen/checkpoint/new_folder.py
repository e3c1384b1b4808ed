"""A folder that appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_new(out: Path) -> None:
    """Raises ValueError if `out` is there: nothing of a user's is written over."""
    if out.exists():
        raise ValueError(f"{out} is there already; choose a new folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, which becomes `out` when the block ends, and goes if it fails. Raises as `check_new`."""
    check_new(out)
    beside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)  # of a command that was killed
    try:
        beside.mkdir(parents=True)
        yield beside
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
