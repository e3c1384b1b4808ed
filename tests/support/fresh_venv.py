"""A virtual environment with what `pip install qvgen[serve]` brings, and nothing else: the wheel, really installed, and the
packages that its metadata ask for, linked file by file from this environment, because downloading them takes minutes.

`python -m tests.support.fresh_venv` prints how many they are, and their bytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
EXTRA = "serve"
NOT_IN_IT = ("assets", "reports", "tests", "docs", "bench")
PROGRAMS = ("sh", "bash", "env")  # all that PATH holds beside the environment; `mlflow models serve` starts bash


@dataclass(frozen=True)
class Installed:
    """`python`: of an environment with `qvgen[serve]` alone, installed from `wheel`."""

    wheel: Path
    venv: Path

    @property
    def python(self) -> str:
        return str(self.venv / "bin" / "python")


def make(folder: Path) -> Installed:
    """In `folder`, unless it is there already, whole."""
    found, done = folder / "venv", folder / "done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        make_venv(build_wheel(folder), found)
        done.touch()
    return Installed(next(folder.glob("qvgen-*.whl")), found)


def build_wheel(folder: Path) -> Path:
    """Built from a copy, without the kernels, which take a minute to compile, and without network."""
    source = folder / "source"
    every = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(every, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in listed:
        if name and (ROOT / name).is_file() and name.split("/")[0] not in NOT_IN_IT:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--config-settings", "wheel.cmake=false", "-w", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("qvgen-*.whl"))


def needed(wheel: Path, extra: str = EXTRA) -> dict[str, Distribution]:
    """Every distribution that the wheel with that extra needs, by its canonical name, as pip would resolve it here."""
    (info,) = [path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info")]
    found: dict[str, Distribution] = {}
    todo: list[tuple[Distribution, frozenset[str]]] = [(PathDistribution(info), frozenset({extra}))]
    seen = set()
    while todo:
        dist, extras = todo.pop()
        for name, wanted in _requirements(dist, extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                found[name] = distribution(name)
                todo.append((found[name], wanted))
    return found


def _requirements(dist: Distribution, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    for text in dist.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


def size_of(dists: dict[str, Distribution]) -> int:
    """Bytes on disk of their files."""
    files = {Path(str(dist.locate_file(name))) for dist in dists.values() for name in dist.files or ()}
    return sum(file.stat().st_size for file in files if file.is_file())


def make_venv(wheel: Path, folder: Path) -> None:
    """A new environment in `folder`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for dist in needed(wheel).values():
        for name in dist.files or ():
            if ".." not in PurePosixPath(name).parts:  # programs in bin/ begin with the path of the other interpreter
                target = site / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.exists():
                    target.symlink_to(os.path.realpath(str(dist.locate_file(name))))
        for entry in dist.entry_points.select(group="console_scripts"):
            _program(folder, entry.name, f"import sys; from {entry.module} import {entry.attr} as run; sys.exit(run())")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    install = [*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)]
    for command in (install, [*pip, "check"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    for program in PROGRAMS:
        (folder / "bin" / program).symlink_to(str(shutil.which(program)))


def _program(folder: Path, name: str, code: str) -> None:
    path = folder / "bin" / name
    path.write_text(f"#!{folder / 'bin' / 'python'}\n{code}\n")
    path.chmod(0o755)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        found = needed(build_wheel(Path(temporary)))
    torch = size_of({"torch": found["torch"]})
    print(
        f"{len(found)} packages, {size_of(found) / 1e9:.2f} GB, of which torch {found['torch'].version} {torch / 1e9:.2f} GB"
    )
