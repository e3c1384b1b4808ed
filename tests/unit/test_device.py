"""Which device a name means, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qvgen.cli.app import run_app
from qvgen.device import lack_of_memory, resolve_device, synchronize, widest_float
from qvgen.params import ParamsError, validate_params

ROOT = Path(__file__).parents[2]


def test_auto_is_the_cpu_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QVGEN_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device() == resolve_device("cpu") == torch.device("cpu")
    synchronize(resolve_device())


def test_auto_is_the_first_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QVGEN_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device() == resolve_device("cuda") == torch.device("cuda", 0)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    for local, card in (("0", 0), ("1", 1), ("2", 0)):  # of three processes on two cards
        monkeypatch.setenv("LOCAL_RANK", local)
        assert resolve_device() == torch.device("cuda", card) and resolve_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ValueError, match="sees 2 CUDA devices"):
        resolve_device("cuda:2")


@pytest.mark.parametrize(("name", "message"), [("cuda:7", "CUDA devices"), ("gpu", "choose auto, cpu"), ("mps", "no MPS")])
def test_the_variable_overrides_and_is_named(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setenv("QVGEN_DEVICE", name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"QVGEN_DEVICE={name}.*{message}"):
        resolve_device("cpu")


def test_mps_has_no_float64() -> None:
    assert widest_float(torch.device("mps")) == torch.float32
    assert widest_float(torch.device("cpu")) == torch.float64


def test_older_params_have_the_defaults_and_others_are_refused() -> None:
    from qvgen.safe_yaml import read_yaml

    tree = read_yaml(ROOT / "params.yaml")
    assert isinstance(tree, dict)
    del tree["compute"]
    assert validate_params(tree, "old").compute.device == "auto"
    with pytest.raises(ParamsError, match=r"compute\.device"):
        validate_params(tree | {"compute": {"device": "tpu"}}, "new")
    with pytest.raises(ParamsError, match=r"compute\.micro_batch = 3 does not divide qat\.batch_size = 16"):
        validate_params(tree | {"compute": {"micro_batch": 3}}, "new")


def allocate_too_much() -> None:
    torch.empty(1 << 52, dtype=torch.uint8)


def of_a_card() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of 79.11 GiB of which 1.20 GiB is free. "
        "Including non-PyTorch memory, this process has 77.9 GiB memory in use."
    )


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (allocate_too_much, "out of memory on the CPU: 4503599.63 GB more were wanted"),
        (lambda: bytearray(1 << 52), "out of memory on the CPU: more was wanted than there is"),
        (of_a_card, "out of memory on GPU 1: 2.50 GiB more were wanted, 1.20 GiB of 79.11 GiB were free"),
    ],
)
def test_a_lack_of_memory_is_one_line(action: Any, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_app(action)
    message = capsys.readouterr().err
    assert ended.value.code == 1 and message.startswith(f"qvgen: {said}; to need less, give fewer --frames,")
    assert message.count("\n") == 1


def test_other_errors_keep_their_traceback() -> None:
    assert lack_of_memory(ValueError("out of memory")) is None
    with pytest.raises(ZeroDivisionError):
        run_app(lambda: 1 // 0)
