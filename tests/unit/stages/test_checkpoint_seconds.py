"""`compute.checkpoint_seconds`: a checkpoint that is due by steps waits until that much time went by since the last one."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qvgen.training.loop import StepRecord
from stages.runtime import training


@pytest.mark.parametrize(("seconds", "expected"), [(0, [2, 4, 6, 8]), (35, [4, 8])])
def test_checkpoints_wait_for_their_time(
    seconds: int, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, saved = SimpleNamespace(now=0.0), []
    compute, qat = SimpleNamespace(checkpoint_seconds=seconds), SimpleNamespace(checkpoint_every=2)

    class Trainer:
        step, sharded, params = 0, False, SimpleNamespace(compute=compute, qat=qat)

        def run(self, until: int, on_step: Any) -> None:
            for step in range(until):
                clock.now += 10
                self.step = step + 1
                on_step(self, StepRecord(step, 0.1, 0.2, 0, 0.0, 1e-3, 10.0))

    monkeypatch.setattr(training.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(training, "save_state", lambda path, trainer: saved.append(trainer.step))
    stage: Any = SimpleNamespace(
        name="qat",
        checkpoint_dir=tmp_path,
        progress=lambda *_, **__: Nothing(),
        log_metrics=lambda *_, **__: None,
        resumable=Nothing,
        params=Trainer.params,
    )
    rows = training._train(stage, Trainer(), 0, 10)  # type: ignore[arg-type]
    assert saved == expected and len(rows) == 10
    with (tmp_path / training.STATE).with_suffix(".csv").open() as file:
        assert len(list(csv.DictReader(file))) == expected[-1], "the rows beside a state are those before it"


class Nothing:
    """A progress bar, or a block, that does nothing."""

    def __enter__(self) -> "Nothing":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def set_postfix(self, **_: object) -> None:
        return None

    def update(self) -> None:
        return None
