"""Peak memory of a training step at the published width of Wan 1.3B, one layer of it, against its budget."""

from pathlib import Path

import pytest

from bench.training_memory import BUDGET, ROWS, in_fresh_process, write_folder


@pytest.mark.slow
def test_a_training_step_stays_in_its_budget(tmp_path: Path) -> None:
    write_folder(tmp_path, layers=1)
    name = "bfloat16, micro-batch 1, checkpointing"
    found = in_fresh_process(tmp_path, ROWS[name])
    assert found["parameters"] > 5e7
    assert found["bytes_per_parameter"] <= BUDGET["bfloat16"], found
