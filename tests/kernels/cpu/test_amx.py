"""The AMX path on any x86 processor: the same source, its tile instructions in plain C++ (csrc/isa/tiles.h)."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


def run(*command: object, **environment: str) -> str:
    words = [str(part) for part in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_emulated_tiles_pass_the_tests_of_the_others(tmp_path: Path) -> None:
    # Where the processor has AMX, the others run the path on its instructions besides.
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"the path is for x86-64, not for {platform.machine()}")
    if missing := [tool for tool in ("cmake", "g++") if not shutil.which(tool)]:
        pytest.skip(f"{', '.join(missing)} not installed")
    run("cmake", "-S", ROOT, "-B", tmp_path, "-DQVGEN_AMX_EMULATED=ON")
    run("cmake", "--build", tmp_path, "-j", 2)
    said = run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "amx-emulated or tiles", "tests/kernels"),
        *("--ignore", Path(__file__).relative_to(ROOT)),
        QVGEN_CPU_LIBRARY=str(tmp_path / "libqvgen_cpu.so"),
    )
    passed = int(said.strip().splitlines()[-1].split(" passed")[0].split()[-1])
    assert passed > 250, said[-2000:]
