"""The manifest of a folder of generated videos: which model, seed and settings made them, so that nothing else is mixed in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_NAMES = "names"  # file name without number and suffix -> prompt, of prompts that cannot name a file
_SAYS_NOTHING = ("generation.json", "README.md", "LICENSE")  # files of a pipeline that do not decide what it computes


def manifest_path(out: Path) -> Path:
    """Where the manifest of a folder of videos lies: beside it, because it may hold nothing but videos."""
    out = out.absolute()
    return out.with_name(f"{out.name}.json")


def model_hash(model: Path) -> str:
    """sha256 over the names and sha256 of the pipeline's files that decide what it computes."""
    import hashlib

    from qvgen.models.hashes import hash_files
    from qvgen.models.source import read_pipeline

    files = [name for name in read_pipeline(model).files if name not in _SAYS_NOTHING]
    records = hash_files(model, files)
    return hashlib.sha256("".join(f"{name} {records[name].sha256}\n" for name in files).encode()).hexdigest()


def claim(out: Path, identity: dict[str, Any], threads: int | None, processes: int) -> int:
    """Threads per process for a run into `out`; a new folder gets its manifest, another one is checked against it.

    Raises ValueError for a folder of another model, seed or settings, and for videos that no manifest speaks for.
    """
    import torch

    path = manifest_path(out)
    if not path.exists():
        if out.is_dir() and any(out.glob("*.mp4")):
            raise ValueError(
                f"{out} holds videos, but {path} is missing, so nobody knows of which model: choose another folder"
            )
        out.mkdir(parents=True, exist_ok=True)
        content = {**identity, "threads": threads or max(1, torch.get_num_threads() // processes)}
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
            os.link(temporary, path)  # unlike a rename, it leaves the manifest of a shard that was quicker
        except FileExistsError:
            pass
        finally:
            temporary.unlink(missing_ok=True)
    try:
        recorded = json.loads(path.read_text())
        recorded.pop(_NAMES, None)
        recorded_threads = int(recorded.pop("threads"))
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{path} is damaged: remove it together with {out}, or choose another folder") from None
    wanted = _flat(identity) | {"threads": threads or recorded_threads}
    there = _flat(recorded) | {"threads": recorded_threads}
    differing = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
    if differing:
        found = "; ".join(f"{name} {there.get(name)!r} there, {wanted.get(name)!r} now" for name in differing)
        raise ValueError(f"{out} was begun otherwise ({path.name}): {found}. Use the same, or choose another folder")
    return recorded_threads


def record_names(out: Path, names: dict[str, str]) -> None:
    """Add short file names and their prompts to the manifest. Several shards may do so at once, with different prompts."""
    if not names:
        return
    from filelock import FileLock

    path = manifest_path(out)
    with FileLock(path.with_name(f".{path.name}.lock")):
        content = json.loads(path.read_text())
        content[_NAMES] = dict(sorted((content.get(_NAMES, {}) | names).items()))
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in identity.items() if name != "settings"}, **identity.get("settings", {})}
