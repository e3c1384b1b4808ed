"""Another build of the compiled kernels, put through the tests of the kernels in a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def passed_with(option: str, build: Path, *selection: object, compiler: str = "g++") -> int:
    """How many tests of `selection` (arguments of pytest) pass with the library that `option` of cmake gives."""
    if missing := [tool for tool in ("cmake", compiler) if not shutil.which(tool)]:
        pytest.skip(f"{', '.join(missing)} not installed")
    _run("cmake", "-S", ROOT, "-B", build, option, f"-DCMAKE_CXX_COMPILER={compiler}")
    _run("cmake", "--build", build, "-j", 2)
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection]
    said = _run(*tests, QVGEN_CPU_LIBRARY=str(build / "libqvgen_cpu.so"))
    return int(said.strip().splitlines()[-1].split(" passed")[0].split()[-1])


def _run(*command: object, **environment: str) -> str:
    words = [str(part) for part in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
