"""Training in several processes that share each batch, on the CPU through gloo."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from qvgen.params import ParamsError
from qvgen.tensors import save_tensors
from qvgen.training.ranks import Ranks, devices_from, ranks
from tests.integration.test_training import settings, trainer
from tests.support.ranks import average_of_all_kinds, fail_on_rank_1
from tests.support.toy_project import ROOT, environment, wait_until

CPU = torch.device("cpu")


def train(folder: Path, group: Ranks) -> list[float]:
    """Through the decay of Φ. Writes the student; returns the losses."""
    losses: list[float] = []
    params = settings(batch_size=4)
    run = trainer("wan", params, ranks=group)
    run.run(params.schedule.total_steps, lambda _, record: losses.append(record.loss))
    save_tensors(folder / f"{group.rank}-of-{group.size}.safetensors", run.student.state_dict())
    return losses


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    with ranks(1, CPU, partial(train, tmp_path)) as alone:
        expected = train(tmp_path, alone)
    with ranks(2, CPU, partial(train, tmp_path)) as group:
        assert group == Ranks(CPU, 0, 2)
        losses = train(tmp_path, group)
    assert losses == pytest.approx(expected, rel=1e-3)  # sums in another order; measured: 1e-5
    one, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("0-of-1", "0-of-2", "1-of-2"))
    assert first.keys() == second.keys() == one.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    far = {name: (first[name] - one[name]).abs().max().item() for name in one}
    assert max(far.values()) < 1e-3, far  # a step moves a weight by as much
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_means_of_tensors_of_all_kinds() -> None:
    with ranks(2, CPU, average_of_all_kinds) as group:
        values = average_of_all_kinds(group)
    for value, expected in zip(values, (0.5, 1.5, 2.5, 3.5, 3.5, 3.5, 4.5), strict=True):
        assert torch.equal(value, torch.full_like(value, expected))


@pytest.mark.slow
def test_a_process_that_ends_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    message = r"^a process of training ended: rank 1 with exit code 1; what it said stands above"
    with pytest.raises(ValueError, match=message), ranks(2, CPU, fail_on_rank_1) as group:
        fail_on_rank_1(group)
    assert "no clips on rank 1" in capfd.readouterr().err


@pytest.mark.slow
def test_kill_9_leaves_no_process() -> None:
    command = [sys.executable, "-m", "tests.support.ranks"]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "together\n"
        others = psutil.Process(process.pid).children(recursive=True)
        assert others
        os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not [other for other in others if other.is_running() and other.status() != psutil.STATUS_ZOMBIE])


def test_as_many_gpus_as_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert devices_from(torch.device("cuda", 1), 3) == [torch.device("cuda", index) for index in (1, 2, 3)]
    assert [len(devices_from(torch.device("cuda"), size)) for size in (1, 4, 6, 7, 16)] == [1, 4, 3, 1, 4]
    assert devices_from(CPU, 2) == [CPU, CPU] and devices_from(torch.device("mps"), 2) == [torch.device("mps")]


def test_a_batch_that_is_not_shared_equally_is_refused() -> None:
    for compute, message in (
        ({"processes": 3}, r"batch_size = 4 clips cannot be shared equally by compute\.processes = 3: choose a multiple of 3"),
        ({"processes": 2, "micro_batch": 4}, r"micro_batch = 4 does not divide qat\.batch_size = 4 / compute\.processes = 2"),
    ):
        with pytest.raises(ParamsError, match=message):
            settings(batch_size=4, compute=compute)
