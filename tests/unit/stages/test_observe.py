"""What stage observe says of the machine. That benchmark alone depends on it, tests/architecture/test_dag.py knows."""

import os
import subprocess
import sys

import pytest

from stages import observe


def test_another_number_of_threads_is_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one = observe.hardware()
    asks = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    assert subprocess.run(asks, check=True, capture_output=True, text=True).stdout.strip() == one["threads"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert observe.hardware() == one | {"threads": "3"} != one
    monkeypatch.setenv("OMP_NUM_THREADS", str(os.cpu_count()))
    every = observe.hardware()
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert observe.hardware() == every
