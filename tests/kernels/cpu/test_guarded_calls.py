"""Thousands of calls of every op, and of the cpu backend's prepare, with wrong lengths, shapes, dtypes, strides, devices and
numbers, on tensors that end at pages which nobody may touch. `make sanitize` runs them too."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from tests.support.guarded import PAGE, Guard

ROOT = Path(__file__).parents[3]
CALLS = 1200  # ten seconds of a quiet core; before the checks were complete, five of them ended the process
SECONDS = 600  # under the sanitizers


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=SECONDS
    )


def test_wrong_arguments_are_told_and_never_read_beyond() -> None:
    done = in_a_process("-m", "tests.support.guarded_calls", "0", str(CALLS))
    lines = done.stdout.splitlines()
    assert done.returncode >= 0, f"{signal.Signals(-done.returncode).name} in call {lines[-1] if lines else '?'}"
    faults = [line for line in lines if line.startswith("  ")]
    assert done.returncode == 0 and lines[-1] == f"{CALLS} calls, 0 faults", "\n".join([*faults, done.stderr[-2000:]])
    shown = [line.split("(")[0].split()[1] for line in lines[:-1]]
    assert len(set(shown)) == 13, "every op was called"


def test_the_guard_ends_a_process_that_reads_beyond() -> None:
    """Else the calls above would prove nothing."""
    code = (
        "import torch, ctypes; from tests.support.guarded import Guard; guard = Guard(); "
        "x = guard.copy(torch.arange(5.0)); print(float(x.sum()), flush=True); ctypes.string_at(x.data_ptr(), 21)"
    )
    done = in_a_process("-c", code)
    assert done.stdout.strip() == "10.0"
    assert done.returncode != 0  # a signal, or the sanitizer's report of it


def test_a_guarded_copy_is_one() -> None:
    with Guard() as guard:
        for tensor in (torch.randn(3, 5), torch.arange(9000), torch.empty(0, 4), torch.tensor(3, dtype=torch.uint8)):
            for at_end in (True, False):
                copied = guard.copy(tensor, at_end)
                assert torch.equal(copied, tensor) and copied.dtype == tensor.dtype
                if tensor.numel():
                    end = copied.data_ptr() + (tensor.numel() * tensor.element_size() if at_end else 0)
                    assert end % PAGE == 0
