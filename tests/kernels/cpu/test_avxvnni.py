"""The AVX-VNNI path on a processor that has AVX-512 instead: the same source, its instruction in AVX-512's encoding."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qvgen.kernels.cpu import library

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
TESTS = ["test_integer.py", "test_linear.py", "test_tokens.py"]


def run(*command: object, **environment: str) -> str:
    words = [str(part) for part in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_the_path_passes_the_tests_of_the_others(tmp_path: Path) -> None:
    if "avxvnni" in library.supported_isas():
        pytest.skip("this processor has AVX-VNNI: the other tests run the path")
    if "avx512vnni" not in library.supported_isas():
        pytest.skip("this processor has neither AVX-VNNI nor AVX-512 VNNI")
    if missing := [tool for tool in ("cmake", "g++") if not shutil.which(tool)]:
        pytest.skip(f"{', '.join(missing)} not installed")
    run("cmake", "-S", ROOT, "-B", tmp_path, "-DQVGEN_AVXVNNI_AS_EVEX=ON")
    run("cmake", "--build", tmp_path, "-j", 2)
    files = [ROOT / "tests/kernels/cpu" / name for name in TESTS]
    said = run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "avxvnni", *files),
        QVGEN_CPU_LIBRARY=str(tmp_path / "libqvgen_cpu.so"),
    )
    passed = int(said.strip().splitlines()[-1].split(" passed")[0].split()[-1])
    assert passed > 100, said[-2000:]
