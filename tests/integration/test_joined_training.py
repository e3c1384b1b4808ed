"""Stages qat and decay in processes that were started by torchrun, or by hand on several hosts, and join each other."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from qvgen.training.ranks import Ranks, ranks
from qvgen.training.sharding import shard_
from tests.integration.test_pipeline import make_project, write_params
from tests.support.stages_in_process import run_stages
from tests.support.toy_project import environment, start

pytestmark = [pytest.mark.slow, pytest.mark.integration]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That stands before qat, with few steps."""
    folder = make_project(tmp_path_factory.mktemp("joined") / "project", "wan", processes=2)
    change(folder, qat={"steps": 3, "checkpoint_every": 2}, decay={"phase_steps": 1, "final_steps": 2})
    run_stages(folder, "fetch", "prepare", "calibrate", "qat")
    return folder


def change(folder: Path, **sections: dict[str, object]) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for name, values in sections.items():
        params[name] |= values
    write_params(folder, params)


def test_torchrun_gives_the_bytes_that_two_processes_give(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "torchrun"
    shutil.copytree(project, folder)
    shutil.rmtree(folder / "artifacts/qat")
    threads = str(max(1, torch.get_num_threads() // 2))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "stages.qat"]
    variables = environment() | {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "share 2 of 2" in done.stderr
    state = "artifacts/qat/state.safetensors"
    assert (folder / state).read_bytes() == (project / state).read_bytes()
    assert len((folder / "metrics/qat.csv").read_text().splitlines()) == 1 + 3


def test_processes_that_share_the_model_meet_on_this_host_alone(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the state of two that did not share it, to what one process makes of it."""
    alone, folder = tmp_path / "alone", tmp_path / "sharded"
    for copy in (alone, folder):
        shutil.copytree(project, copy)
    change(alone, compute={"processes": 1})
    run_stages(alone, "decay")
    change(folder, compute={"shard": True})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    other = start(folder, "stages.decay", RANK="1", PYTHONPATH=str(folder), OMP_NUM_THREADS="1", **variables)
    for name, value in (variables | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    listening = []

    def shard_and_look(model: nn.Module, ranks: Ranks) -> None:
        connections = psutil.Process().net_connections("tcp")
        listening.extend(c.laddr for c in connections if c.status == psutil.CONN_LISTEN)
        shard_(model, ranks)

    monkeypatch.setattr("qvgen.training.recipe.shard_", shard_and_look)
    run_stages(folder, "decay")
    said, _ = other.communicate(timeout=600)
    assert other.returncode == 0, said
    assert port in {address.port for address in listening}
    assert {address.ip for address in listening} == {"127.0.0.1"}
    one, two = (load_file(path / "artifacts/decay/student.safetensors") for path in (alone, folder))
    assert {k: (v.shape, v.dtype) for k, v in one.items()} == {k: (v.shape, v.dtype) for k, v in two.items()}
    far = {key: (two[key] - one[key]).abs().max().item() for key in one}
    assert max(far.values()) < 1e-3, far  # a step moves a weight by up to 4e-3
    run_stages(folder, "pack")


def test_a_process_that_no_other_can_meet_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def join() -> None:
        with ranks(1, torch.device("cpu"), print):
            pass

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"RANK=1: processes of training meet at MASTER_ADDR and MASTER_PORT, as torchrun"):
        join()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match=r"MASTER_PORT= is no number: it is the port at MASTER_ADDR=127\.0\.0\.1"):
        join()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(
            ValueError, match=r"2 processes did not meet at MASTER_ADDR=127\.0\.0\.1 MASTER_PORT=\d+: .*in use"
        ):
            join()
    monkeypatch.setattr("socket.if_nameindex", lambda: [(1, "eth0")])
    monkeypatch.setenv("MASTER_PORT", "1")
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match="no loopback interface among eth0: name one in GLOO_SOCKET_IFNAME"):
        join()
