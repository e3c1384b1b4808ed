"""What processes of tests/integration/test_sharding.py do; by itself, a run that leaves states until it is killed."""

import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from qvgen.checkpoint.training import load_training_state, save_training_state
from qvgen.sharded import own_rows
from qvgen.training.loop import StepRecord, Trainer
from qvgen.training.ranks import Ranks, ranks
from tests.integration.test_training import settings, trainer

CPU = torch.device("cpu")
COMPUTE = {"shard": True, "checkpointing": True, "micro_batch": 1}
PARAMS = settings(steps=1, phase=2, final=1, batch_size=4, ema_decay=0.9, compute=COMPUTE)
CUT, KILLED, END = 2, 4, PARAMS.schedule.total_steps  # inside the first phase of Φ's decay, and in the second
Rows = list[tuple[float, float]]  # loss and gradient norm of each step


def save(path: Path, run: Trainer) -> None:
    save_training_state(None if run.ranks.rank else path, run.student, run.optimizer, run.average, run.step)


def train(folder: Path, name: str, group: Ranks, source: str | None = None) -> Rows:
    """To the end, from the state `source` if it is given. Leaves states `name` at CUT and at the end."""
    rows: Rows = []
    run = trainer("wan", PARAMS, ranks=group)
    if source is not None:
        run.step = load_training_state(folder / source, run.student, run.optimizer, run.average)

    def on_step(run: Trainer, record: StepRecord) -> None:
        rows.append((record.loss, record.gradient_norm))
        if run.step in (CUT, END):
            with suppress(FileNotFoundError):  # of the first; the others give it their parts, and all go on
                save(folder / "no folder" / "state", run)
            save(folder / f"{name} at {run.step}", run)

    run.run(END, on_step)
    (folder / f"{name} bytes of {group.rank}").write_text(str(bytes_kept(run)))
    return rows


def bytes_kept(run: Trainer) -> int:
    """Of student, teacher and the optimizer's moments, in this process."""
    moments = [value for state in run.optimizer.state.values() for value in state.values()]
    kept = (own_rows(tensor) for tensor in (*run.student.parameters(), *run.teacher.parameters(), *moments))
    return sum(tensor.nbytes for tensor in kept)


def train_three_times(folder: Path, group: Ranks) -> Rows:
    rows = train(folder, "two", group)
    train(folder, "killed, then two", group, "killed")
    train(folder, "one, then two", group, f"one at {CUT}")
    return rows


def train_until_killed(folder: Path, group: Ranks) -> None:
    run = trainer("wan", PARAMS, ranks=group)
    run.run(KILLED, lambda run, _: save(folder / "killed", run))
    if group.rank == 0:
        print("waits", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    with ranks(2, CPU, partial(train_until_killed, Path(sys.argv[1]))) as group:
        train_until_killed(Path(sys.argv[1]), group)
