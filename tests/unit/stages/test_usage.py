"""The line that ends a stage, and what it says where memory did not suffice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qvgen.params import load_params
from stages.runtime import run
from stages.runtime.usage import KNOBS, out_of_memory, summary

ROOT = Path(__file__).parents[3]
PARAMS = load_params(ROOT / "params.yaml")
TOO_MUCH = 1 << 52  # bytes: no machine has them


def failure(allocate: Any) -> Exception:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    return caught.value


@pytest.mark.parametrize(
    ("allocate", "wanted"),
    [
        (lambda: torch.empty(TOO_MUCH, dtype=torch.uint8), "4503599.63 GB more were wanted"),
        (lambda: np.empty(TOO_MUCH, np.uint8), "4.00 PiB more were wanted"),
    ],
)
def test_a_lack_of_memory_names_amount_device_and_knob(allocate: Any, wanted: str) -> None:
    said = out_of_memory(failure(allocate), "qat")
    assert said is not None and said.startswith(f"qat: out of memory on the CPU: {wanted}")
    assert "lower compute.micro_batch, set compute.checkpointing: true" in said


def test_a_card_that_is_full() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB")
    said = out_of_memory(error, "evaluate")
    assert said is not None and "on the GPU: 2.50 GiB more were wanted" in said and "evaluate.batch_size" in said


def test_other_errors_are_none_of_it() -> None:
    assert out_of_memory(RuntimeError("mat1 and mat2 must have the same dtype"), "qat") is None
    assert out_of_memory(ValueError("out of memory"), "qat") is None


def test_every_knob_exists() -> None:
    for stage, text in KNOBS.items():
        for word in text.replace(":", "").replace(",", "").split():
            section, _, knob = word.partition(".")
            if knob:
                assert hasattr(getattr(PARAMS, section), knob), (stage, word)


def test_the_stage_ends_with_one_line(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def execute(name: str, function: Any, shared: bool) -> None:
        torch.empty(TOO_MUCH, dtype=torch.uint8)

    monkeypatch.setattr(run, "_execute", execute)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        run.stage_main("decay", lambda stage: None)
    said = capfd.readouterr().err
    assert ended.value.code == 1 and said.startswith("decay: out of memory on the CPU") and said.count("\n") == 1


def test_throughput_is_of_this_run(capfd: Any) -> None:
    class Counted:
        counted, done, seconds = "steps", 30, 12.0

    said = summary("qat", PARAMS, [Counted()])
    assert said.startswith("qat: cpu, peak ") and said.endswith("30 steps in 12.0 s (2.5 a second)")
    bar = run.Progress(total=10, initial=4, unit="step")
    bar.skip(2)  # by another process
    bar.update(3)
    bar.close()
    assert bar.n == 9 and bar.done == 3 and 0 < bar.seconds < 60
