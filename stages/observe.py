"""Stage observe: what results depend on besides parameters and the data that dvc.yaml names. Writes artifacts/hardware.json,
the machine, which the benchmark depends on; artifacts/code.json, with the fingerprint of each stage's code; and
artifacts/inputs.json, with the content of the folders and the file that params.yaml names.

It runs at every `dvc repro`, so it imports nothing heavy, caches what it has read in .qvgen/, and records no run.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import astuple
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stages.runtime.code import code_fingerprints
from stages.runtime.inputs import SEEN as SEEN_INPUTS
from stages.runtime.inputs import Inputs
from stages.runtime.machine import processor
from stages.runtime.source import BUILD, PACKAGES, Source, is_code, summarize

HARDWARE, CODE, INPUTS = (Path(f"artifacts/{name}.json") for name in ("hardware", "code", "inputs"))
SEEN = Path(".qvgen/sources.json")


def hardware() -> dict[str, object]:
    """The processor, its cores, threads that torch may take, memory in GiB, accelerators, versions of Python and torch."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = None
    return {
        "processor": processor(),
        "logical_cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count()),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "accelerators": sorted(_nvidia()),
        "python": platform.python_version(),
        "torch": torch,
    }


def _nvidia() -> list[str]:
    """Names of NVIDIA devices, from the driver: asking torch would take seconds."""
    cards = [card.read_text().splitlines() for card in Path("/proc/driver/nvidia/gpus").glob("*/information")]
    return [line.partition(":")[2].strip() for card in cards for line in card if line.startswith("Model")]


def code(root: Path) -> dict[str, str]:
    """Stage -> fingerprint of the code that it can reach, as the checkout `root` has it. Writes nothing."""
    return _fingerprints(Sources(root))


def _fingerprints(sources: Sources) -> dict[str, str]:
    stages = sorted(path for path in sources.paths if path.startswith("stages/") and path.count("/") == 1)
    names = [Path(path).stem for path in stages if not path.endswith("__init__.py")]
    return code_fingerprints(sources.read, sources.paths, [name for name in names if name != Path(__file__).stem])


class Sources:
    """The source files of a checkout. What was read of a file holds until its size or one of its times changes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths = [path for name in (*PACKAGES, BUILD) for path in _files(root, name) if is_code(path)]
        try:
            self._known = json.loads((root / SEEN).read_text())
        except (OSError, ValueError):
            self._known = {}
        own = Path(summarize.__code__.co_filename).stat()
        self._reader = [platform.python_version(), own.st_mtime_ns, own.st_size]
        self._seen: dict[str, list] = {}

    def read(self, path: str) -> Source:
        """Raises OSError for a file that cannot be read."""
        stat = (self.root / path).stat()
        state = [stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, *self._reader]
        known = self._known.get(path)
        if known is None or known[0] != state:
            known = [state, astuple(summarize(path, (self.root / path).read_bytes()))]
        self._seen[path] = known
        body, imports, mentions, asks, computes = known[1]
        named = tuple((module, name, alias) for module, name, alias in imports)
        return Source(body, named, tuple(mentions), tuple(asks), tuple(computes))

    def remember(self) -> None:
        """Write the cache of what was read. Another process may do so at the same time."""
        if self._seen != self._known:
            _write(self.root / SEEN, json.dumps(self._seen))


def _files(root: Path, name: str) -> list[str]:
    found, todo = [], [name]
    while todo:
        path = todo.pop()
        if (root / path).is_dir():
            todo += [f"{path}/{entry.name}" for entry in os.scandir(root / path) if entry.name != "__pycache__"]
        elif (root / path).exists():
            found.append(path)
    return sorted(found)


def texts(root: Path) -> dict[Path, str]:
    """What the stage would write in the checkout `root`, by path. Writes nothing."""
    return _texts(Sources(root), Inputs(root))


def _texts(sources: Sources, inputs: Inputs) -> dict[Path, str]:
    found = {HARDWARE: hardware(), CODE: {"code": _fingerprints(sources)}, INPUTS: {"inputs": inputs.describe()}}
    return {path: json.dumps(content, indent=2) + "\n" for path, content in found.items()}


def write(root: Path) -> None:
    """Run the stage in the checkout `root`."""
    sources, inputs = Sources(root), Inputs(root)
    for path, text in _texts(sources, inputs).items():
        _write(root / path, text)
    sources.remember()
    if inputs.changed:
        _write(root / SEEN_INPUTS, json.dumps(inputs.seen))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)


if __name__ == "__main__":
    write(Path.cwd())
