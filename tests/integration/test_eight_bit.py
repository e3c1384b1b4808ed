"""Moments in 8 bits: what they take, how near they come, and that a run which is stopped goes on bit for bit."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import yaml

from bench.training_bytes import PRECISIONS, held, measure, write_model
from bench.training_bytes import settings as bench_settings
from qvgen.checkpoint.training import load_training_state, save_training_state
from qvgen.data.latents import LatentDataset
from qvgen.models.wan import TINY, WanFamily
from qvgen.nn.swap import add_phi_, prepare_
from qvgen.params import Params, validate_params
from qvgen.training.loop import Trainer
from qvgen.training.optim import build_optimizer

ROOT = Path(__file__).parents[2]
CUTS = (2, 4, 6)  # at the first rank of Φ, within the second, without Φ


def settings(optimizer: str) -> Params:
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    tree["qat"] |= {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "optimizer": optimizer}
    tree["decay"] |= {"initial_rank": 2, "decay_ratio": 0.5, "phase_steps": 1, "final_steps": 3}
    return validate_params(tree, "params.yaml")


def trainer(optimizer: str) -> Trainer:
    """A Wan of one block that is wide enough for blocks of 256 codes."""
    torch.manual_seed(0)
    teacher = WanFamily.transformer({**TINY, "num_layers": 1, "attention_head_dim": 32}).eval()
    student, params = copy.deepcopy(teacher), settings(optimizer)
    prepare_(student, params.effective_scheme, default_targets=WanFamily().default_targets)
    add_phi_(student, params.decay.initial_rank)
    data = LatentDataset(torch.randn(4, 4, 3, 8, 8), torch.zeros(4).long(), ["a"], torch.randn(2, 8, TINY["text_dim"]))
    return Trainer(student, teacher, WanFamily(), data, params)


def test_without_torchao_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    student = trainer("adamw").student
    monkeypatch.setitem(sys.modules, "torchao.optim", None)  # as Python itself notes that there is no such module
    with pytest.raises(
        ValueError, match=r"adamw8bit needs torchao .*pip install 'torchao>=0\.18', or set qat\.optimizer: adamw"
    ):
        build_optimizer(student, settings("adamw8bit").qat)


def test_the_bench_counts_what_a_step_leaves(tmp_path: Path) -> None:
    """Four bytes for a weight, its gradient and each moment, and as much for the teacher; half for one of 16 bits."""
    write_model(tmp_path, TINY)
    found = {precision: measure(tmp_path, bench_settings("adamw", precision, 2)) for precision in PRECISIONS}
    whole, mixed = found["float32"], found["bfloat16"]
    trained = whole["gradients"]  # with Φ and quantizers more than a weight for each of the teacher's
    assert 4 < trained < 8 and trained <= whole["student"]
    assert whole["moments"] == pytest.approx(2 * trained, rel=0.01)  # and a counter for each tensor
    assert whole["teacher"] == 4 and 2 <= mixed["teacher"] < 4
    assert all(mixed[part] == whole[part] for part in ("student", "gradients", "moments"))


@pytest.mark.slow
def test_eight_bits_learn_alike_and_go_on_where_they_stopped(tmp_path: Path) -> None:
    pytest.importorskip("torchao.optim", reason="torchao is not installed: pip install 'torchao>=0.18'")
    plain, plain_losses = trainer("adamw"), []
    plain.run(plain.schedule.total_steps, lambda _, record: plain_losses.append(record.loss))
    whole, losses = trainer("adamw8bit"), []
    whole.run(whole.schedule.total_steps, lambda _, record: losses.append(record.loss))
    assert losses == pytest.approx(plain_losses, rel=0.05)
    assert losses[0] == plain_losses[0] and losses[2:] != plain_losses[2:]

    def moments(of: Trainer, parameter: torch.nn.Parameter) -> int:
        return held([v for k, v in of.optimizer.state[parameter].items() if k != "step"])

    wide, narrow = whole.student.get_parameter("blocks.0.attn1.to_q.weight"), whole.student.get_parameter("proj_out.bias")
    assert moments(whole, wide) == 2 * (wide.numel() + 4 * wide.numel() // 256 + 4 * 256)  # codes, scales, table
    assert moments(whole, narrow) == 8 * narrow.numel()
    assert moments(plain, plain.student.get_parameter("blocks.0.attn1.to_q.weight")) == 8 * wide.numel()

    for cut in CUTS:
        first, path = trainer("adamw8bit"), tmp_path / f"{cut}.safetensors"
        first.run(cut)
        save_training_state(path, first.student, first.optimizer, first.average, first.step)
        second, continued = trainer("adamw8bit"), []
        second.step = load_training_state(path, second.student, second.optimizer, second.average)
        second.run(whole.schedule.total_steps, lambda _, record, found=continued: found.append(record.loss))
        assert continued == losses[cut:]
        for name, tensor in whole.student.state_dict().items():
            assert torch.equal(tensor, second.student.state_dict()[name]), (cut, name)
        for (_, ours), (_, theirs) in zip(whole.optimizer.state.items(), second.optimizer.state.items(), strict=True):
            assert {k: type(v) for k, v in ours.items()} == {k: type(v) for k, v in theirs.items()}

    other = trainer("adamw")
    with pytest.raises(ValueError, match=r"was written with qat\.optimizer: adamw8bit; set that again, or delete it"):
        load_training_state(tmp_path / "2.safetensors", other.student, other.optimizer, other.average)
