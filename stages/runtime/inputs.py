"""What stages read from outside the project: the folders of `fetch.source` and `prepare.folder`, and the file of
`evaluate.prompts_file`, by content.

DVC tracks paths that dvc.yaml names, and these stand in params.yaml. So stage observe describes them at every `dvc repro`, and
fetch and prepare depend on the description. A file is read once: its hash holds until its size or one of its times changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qvgen.models.files import BESIDE, RECORD, SUFFIXES
from qvgen.models.source import COMPONENTS, OTHERS
from qvgen.safe_yaml import read_yaml

SEEN = Path(".qvgen/inputs.json")
READERS = 8  # threads: hashlib computes beside others
TOLD = 2**30  # bytes from which the user is told that files are being read


class Inputs:
    """The folders that params.yaml of the checkout `root` names, as they are now."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            self._known = json.loads((root / SEEN).read_text())
        except (OSError, ValueError):
            self._known = {}
        self.seen: dict[str, list] = {}
        self.changed = False  # whether `seen` holds more or less than what was known

    def describe(self) -> dict[str, dict[str, Any]]:
        """Stage -> {"files", "bytes", "sha256"} of what it reads; the hash covers names, sizes and contents. A stage that
        reads no such folder, or one that is missing (its own error says so), has no files."""
        try:
            params = read_yaml(self.root / "params.yaml")
            fetch, prepare, evaluate = (params.get(name) or {} for name in ("fetch", "prepare", "evaluate"))
            source, folder, prompts = fetch.get("source"), prepare.get("folder"), evaluate.get("prompts_file")
        except (OSError, ValueError, AttributeError):  # stages say what is wrong with params.yaml
            source = folder = prompts = None
        found = {
            "fetch": self._listing(source, _of_a_model),
            "prepare": self._listing(folder, _visible),
            "evaluate": self._listing(prompts, _itself),
        }
        self.changed = self.seen != self._known
        return found

    def _listing(self, folder: Any, files: Callable[[Path], Iterator[Path]]) -> dict[str, Any]:
        place = self.root / (folder if isinstance(folder, str) else "")
        paths = sorted(files(place)) if isinstance(folder, str) and place.exists() else []
        states = {path: _state(path) for path in paths}
        new = [path for path in paths if self._known.get(str(path), [None])[0] != states[path]]
        if (size := sum(states[path][0] for path in new)) > TOLD:
            print(f"observe: reading {len(new)} new files of {folder}, {size / 1e9:.1f} GB, once", file=sys.stderr, flush=True)
        with ThreadPoolExecutor(READERS) as pool:
            hashes = dict(zip(new, pool.map(_sha256, new), strict=True))
        for path in paths:
            self.seen[str(path)] = [states[path], hashes[path]] if path in hashes else self._known[str(path)]
        listing = [[path.relative_to(place).as_posix(), states[path][0], self.seen[str(path)][1]] for path in paths]
        digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
        return {"files": len(paths), "bytes": sum(size for _, size, _ in listing), "sha256": digest}


def _itself(file: Path) -> Iterator[Path]:
    if file.is_file():
        yield file


def _of_a_model(folder: Path) -> Iterator[Path]:
    """The files that stage fetch copies, and the record of hashes that it holds them against."""
    yield from (path for name in (*BESIDE, RECORD) if (path := folder / name).is_file())
    for component in (*COMPONENTS, *OTHERS):
        yield from (path for path in _visible(folder / component) if path.suffix in SUFFIXES)


def _visible(folder: Path) -> Iterator[Path]:
    """Files below a folder, links followed, hidden ones left out."""
    todo, entered = [folder], set()
    while todo:
        here = todo.pop()
        try:
            state = here.stat()
            entries = list(os.scandir(here))
        except OSError:
            continue
        if (state.st_dev, state.st_ino) in entered:  # a link to a folder above
            continue
        entered.add((state.st_dev, state.st_ino))
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                todo.append(here / entry.name)
            elif entry.is_file():
                yield here / entry.name


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # the stage that reads it says so too
        return f"unreadable: {error.strerror}"
