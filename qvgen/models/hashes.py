"""The bytes of a model source: sha256 of every file, compared with the recorded ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qvgen.models.files import BESIDE, MANIFEST, RECORD, SUFFIXES, SourceError, read_json


@dataclass(frozen=True)
class FileRecord:
    sha256: str
    bytes: int


def hash_files(
    folder: str | Path, files: Iterable[str], on_bytes: Callable[[int], object] = lambda count: None
) -> dict[str, FileRecord]:
    """sha256 and size of each file; `on_bytes` is called with the size of each piece read."""
    records = {}
    for name in files:
        digest, total = hashlib.sha256(), 0
        with (Path(folder) / name).open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
                total += len(piece)
                on_bytes(len(piece))
        records[name] = FileRecord(digest.hexdigest(), total)
    return records


def recorded_hashes(folder: str | Path) -> dict[str, str] | None:
    """Path -> sha256 as recorded in the folder's manifest.json or sha256.json; None if it has neither."""
    folder = Path(folder)
    for name in (MANIFEST, RECORD):
        if (folder / name).is_file():
            record = read_json(folder / name)
            entries = record.get("files", record)
            return {path: entry["sha256"] if isinstance(entry, dict) else entry for path, entry in entries.items()}
    return None


def check_hashes(found: Mapping[str, FileRecord], recorded: Mapping[str, str], where: str | Path) -> None:
    """Raises SourceError that lists every file that was changed, removed or added after it was recorded."""
    ours = {path: sha for path, sha in recorded.items() if _belongs(path, found)}
    faults = [f"{path}: is missing" for path in ours if path not in found]
    for path, file in found.items():
        if path not in ours:
            faults.append(f"{path}: was added")
        elif ours[path] != file.sha256:
            faults.append(f"{path}: expected sha256 {ours[path]}, found {file.sha256}")
    if faults:
        listed = "\n  ".join(sorted(faults))
        raise SourceError(
            f"{where} is not what its record says:\n  {listed}\n"
            "Get the files again from where they came from, or delete the record if you changed them on purpose"
        )


def _belongs(path: str, found: Mapping[str, FileRecord]) -> bool:
    """Whether a recorded path lies in the pipeline: a record may also cover what is beside it, such as scripts."""
    folders = {name.partition("/")[0] for name in found if "/" in name}
    top, slash, _ = path.partition("/")
    return (top in folders and Path(path).suffix in SUFFIXES) if slash else path in BESIDE
