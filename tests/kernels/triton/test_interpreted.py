"""The tests in kernels/ in Triton's interpreter: what the kernels compute, on a machine without a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).with_name("kernels")


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(path.name for path in KERNELS.glob("test_*.py")))
def test_kernels_compute_what_the_reference_does(file: str) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install -e .[triton]")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(KERNELS / file)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout, result.stdout
