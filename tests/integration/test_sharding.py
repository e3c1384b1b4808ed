"""Training whose models and moments two processes hold in parts, on the CPU through gloo, from Φ to the end of its decay."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qvgen.params import ParamsError
from qvgen.tensors import save_tensors
from qvgen.training.ranks import Ranks, ranks
from tests.integration.test_training import settings
from tests.support.sharding import CPU, CUT, END, Rows, train, train_three_times
from tests.support.toy_project import ROOT, environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the states of one process, of two, and of two that were killed."""
    folder = tmp_path_factory.mktemp("states")
    one = train(folder, "one", Ranks(CPU))
    command = [sys.executable, "-m", "tests.support.sharding", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        os.kill(process.pid, signal.SIGKILL)
    with ranks(2, CPU, partial(train_three_times, folder)) as group:
        two = train_three_times(folder, group)
    train(folder, "two, then one", Ranks(CPU), f"two at {CUT}")
    assert_near(one, two)
    return folder


def assert_near(one: Rows, two: Rows) -> None:
    """Sums in another order; measured: 2e-6."""
    assert len(one) == len(two) == END
    for ours, theirs in zip(one, two, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "one, then two", "two, then one"])
def test_two_processes_with_half_a_model_each_train_what_one_trains(folder: Path, name: str) -> None:
    one, other = load_file(folder / f"one at {END}"), load_file(folder / f"{name} at {END}")
    assert {k: (v.shape, v.dtype) for k, v in one.items()} == {k: (v.shape, v.dtype) for k, v in other.items()}
    save_tensors(folder / "whole", other, {"step": str(END)})
    assert (folder / "whole").read_bytes() == (folder / f"{name} at {END}").read_bytes()  # gathered, the same file
    far = {key: (other[key] - one[key]).abs().max().item() for key in one}
    assert max(far.values()) < 1e-4, far  # a step moves a weight by 1e-3; measured: 5e-6


@pytest.mark.slow
def test_killed_and_resumed_they_leave_the_same_bytes(folder: Path) -> None:
    expected = (folder / f"two at {END}").read_bytes()
    assert (folder / f"killed, then two at {END}").read_bytes() == expected


@pytest.mark.slow
def test_each_keeps_half_of_the_bytes(folder: Path) -> None:
    one = int((folder / "one bytes of 0").read_text())
    shares = [int((folder / f"two bytes of {rank}").read_text()) / one for rank in range(2)]
    # Tensors of an odd number of rows, and steps of moments, which are not shared.
    assert shares == [pytest.approx(0.5, abs=0.02)] * 2


def test_what_cannot_be_sharded_is_refused() -> None:
    for method in ("efficientdm", "finetune"):
        with pytest.raises(ParamsError, match=rf"compute\.shard = true: method {method} needs the whole trained student"):
            settings(method, compute={"shard": True})
    with pytest.raises(ParamsError, match=r"shares moments of qat\.optimizer: adamw, not of adamw8bit"):
        settings(optimizer="adamw8bit", compute={"shard": True})
