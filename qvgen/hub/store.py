"""The user's cache of models: a folder for each set of hashes, whole or absent, which several processes may use at once.

models/<digest>/...                 the files; <digest> is the sha256 of their paths and hashes
names/<server>/<name>/<version>     what the registry said, so that a version can be used without it
names/<server>/<name>/@<alias>      the version that an alias named when it was last asked for
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

from qvgen.cache import cache_folder
from qvgen.hub.reference import Reference
from qvgen.hub.tracking import Registered
from qvgen.models.hashes import hash_files

_PIECE = 1 << 22  # bytes
Fetch = Callable[[str, IO[bytes]], None]


def faults_of(folder: Path, files: Mapping[str, str]) -> list[str]:
    """What is wrong with a folder that should hold exactly these files: missing, changed, added."""
    faults = []
    for path, sha256 in files.items():
        if not (folder / path).is_file():
            faults.append(f"{path} is missing")
        elif hash_files(folder, [path])[path].sha256 != sha256:
            faults.append(f"{path} is not what was registered")
    there = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return faults + [f"{path} was added" for path in sorted(there) if path not in files]


def keep(files: Mapping[str, str], fetch: Fetch) -> Path:
    """The folder of the cache with these files, each hashed now; what is missing or damaged is fetched.

    `fetch(path, out)` writes one file, and raises if it cannot. Raises ValueError for a cache that cannot be written, and what
    `fetch` raises: then nothing appears, and whole files are kept for the next try.
    """
    from filelock import FileLock

    text = "".join(f"{path} {sha256}\n" for path, sha256 in sorted(files.items()))
    folder = cache_folder() / "models" / hashlib.sha256(text.encode()).hexdigest()[:32]
    if folder.is_dir() and not faults_of(folder, files):  # also in a cache that cannot be written
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock")).acquire()
    except OSError as error:
        raise ValueError(f"{folder.parent} cannot be written ({error}): set QVGEN_CACHE to a folder that can") from None
    with lock:  # what `acquire` returns releases it
        if folder.is_dir() and not faults_of(folder, files):
            return folder
        part = folder.with_suffix(".part")
        if folder.is_dir():  # damaged: others must not find it
            shutil.rmtree(part, ignore_errors=True)
            folder.rename(part)
        part.mkdir(exist_ok=True)
        for path in sorted(file for file in part.rglob("*") if file.is_file()):
            if path.relative_to(part).as_posix() not in files:
                path.unlink()
        for path, sha256 in files.items():
            target = part / path
            if target.is_file() and hash_files(part, [path])[path].sha256 == sha256:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with target.open("wb") as out:
                    fetch(path, out)
                    out.flush()
                    os.fsync(out.fileno())
            except OSError as error:
                raise ValueError(f"{target} cannot be written ({error}): free some room, or set QVGEN_CACHE") from error
        part.rename(folder)
        return folder


def copy_checked(source: IO[bytes], out: IO[bytes], sha256: str) -> None:
    """Stream a file. Raises ValueError if it is another one than `sha256` says."""
    out.seek(0)
    out.truncate()
    digest = hashlib.sha256()
    while piece := source.read(_PIECE):
        digest.update(piece)
        out.write(piece)
    if digest.hexdigest() != sha256:
        raise ValueError(f"has other bytes, of sha256 {digest.hexdigest()[:12]}..., registered is {sha256[:12]}...")


def remember(uri: str, reference: Reference, model: Registered) -> None:
    """Note what the registry said; versions do not change, aliases are noted anew each time. Where the cache cannot be
    written nothing is noted."""
    with suppress(OSError):
        _write(_note(uri, model.name, str(model.version)), asdict(model))
        if reference.alias is not None:
            _write(_note(uri, model.name, f"@{reference.alias}"), {"version": model.version})


def recall(uri: str, reference: Reference) -> Registered | None:
    """What the registry said of a version or alias when it was last asked; None if it never was."""
    try:
        number = reference.version
        if number is None:
            number = json.loads(_note(uri, reference.name, f"@{reference.alias}").read_text())["version"]
        return Registered(**json.loads(_note(uri, reference.name, str(number)).read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _note(uri: str, name: str, what: str) -> Path:
    return cache_folder() / "names" / hashlib.sha256(uri.encode()).hexdigest()[:16] / name / f"{what}.json"


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(content, indent=2) + "\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
