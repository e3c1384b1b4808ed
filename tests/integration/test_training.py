"""Quantization-aware training on two-layer models of both families, from prepare_ to convert_."""

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
import yaml
from torch import nn

from qvgen.checkpoint.training import load_training_state, save_training_state
from qvgen.data.latents import LatentDataset
from qvgen.models.cogvideox import CogVideoXFamily
from qvgen.models.cogvideox import tiny_transformer as tiny_cogvideox_transformer
from qvgen.models.family import Family
from qvgen.models.wan import WanFamily
from qvgen.models.wan import tiny_transformer as tiny_wan_transformer
from qvgen.nn.packed_linear import PackedLinear
from qvgen.nn.swap import add_phi_, convert_, prepare_, qat_layers, set_phi_
from qvgen.params import Params, validate_params
from qvgen.quant.scheme import QuantScheme
from qvgen.training.loop import StepRecord, Trainer
from qvgen.training.optim import build_optimizer, learning_rate_factor
from qvgen.training.ranks import Ranks
from qvgen.training.sharding import shard_, start_phi_

SCHEME = QuantScheme(timestep_groups=5)
ROOT = Path(__file__).parents[2]


def settings(
    method: str = "qvgen",
    rank: int = 4,
    steps: int = 3,
    phase: int = 2,
    final: int = 3,
    compute: Mapping[str, object] = MappingProxyType({}),
    **qat: object,
) -> Params:
    """Parameters of a short run: 3 + 3 * 2 + 3 = 12 steps unless said otherwise."""
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    tree["method"] = method
    tree["qat"] |= {
        "steps": steps,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "quantizer_learning_rate": 1e-4,
        "clip_learning_rate": 1e-2,
        "warmup_fraction": 0.1,
        "final_learning_rate": 0.1,
        "caption_dropout": 0.1,
    } | qat
    tree["decay"] |= {"initial_rank": rank, "phase_steps": phase, "final_steps": final}
    tree["compute"] |= compute
    return validate_params(tree, "test")


SETTINGS = settings()
SCHEDULE = SETTINGS.schedule


def subject(name: str) -> tuple[nn.Module, Family, LatentDataset]:
    """A two-layer transformer, its adapter, and random latents and texts that fit it."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    if name == "wan":
        model, family = tiny_wan_transformer(), WanFamily(shift=3.0)
        shape: tuple[int, ...] = (8, model.config.in_channels, 3, 8, 8)
        text_shape = (4, 6, model.config.text_dim)
    else:
        model = tiny_cogvideox_transformer(rotary=name.endswith("rotary"))
        family = CogVideoXFamily({})
        config = model.config
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        shape = (8, frames, config.in_channels, config.sample_height, config.sample_width)
        text_shape = (4, config.max_text_seq_length, config.text_embed_dim)
    latents, text = torch.randn(shape, generator=generator), torch.randn(text_shape, generator=generator)
    data = LatentDataset(latents, torch.arange(8) % 3, ["one", "two", "three"], text)
    return model, family, data


FAMILIES = ("wan", "cogvideox", "cogvideox-rotary")


def trainer(name: str, params: Params = SETTINGS, scheme: QuantScheme = SCHEME, ranks: Ranks | None = None) -> Trainer:
    teacher, family, data = subject(name)
    student = copy.deepcopy(teacher)
    prepare_(student, scheme, default_targets=family.default_targets)
    # Whole ranges are clips of 1, whose logits do not learn; train from where a search would start.
    for _, layer in qat_layers(student):
        assert layer.input_quantizer is not None
        nn.init.constant_(layer.input_quantizer.clip_lower_logit, 1.5)
        nn.init.constant_(layer.input_quantizer.clip_upper_logit, 1.5)
    sharded = ranks is not None and ranks.size > 1 and params.compute.shard
    if params.schedule.initial_rank:
        add_phi_(student, params.schedule.initial_rank, torch.Generator().manual_seed(0) if sharded else None)
    if ranks is not None and sharded:
        for model in (teacher.requires_grad_(False), student):
            shard_(model, ranks)
        start_phi_(student, ranks.copy_from_first_)
    return Trainer(student, teacher, family, data, params, ranks)


def state(of: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in of.student.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_from_full_precision_to_packed(name: str) -> None:
    run, records = trainer(name), []
    blocks = [n for n, m in run.teacher.named_modules() if isinstance(m, nn.Linear) and "blocks." in n]
    assert [n for n, _ in qat_layers(run.student)] == blocks
    with pytest.raises(ValueError, match="Φ is still active"):
        convert_(run.student)
    run.run(SCHEDULE.total_steps, lambda _, record: records.append(record))
    assert [r.rank for r in records] == [4] * 3 + [4] * 2 + [2] * 2 + [1] * 2 + [0] * 3
    assert all(r.gradient_norm > 0 for r in records)
    student = run.finish()
    inputs = (run.data.latents[:2], torch.tensor([100.0, 900.0]), run.data.embeddings[:2])
    with torch.no_grad():
        trained = run.family.predict(student, *inputs)
        weights = {n: layer.weight_quantizer.dequantized(layer.weight) for n, layer in qat_layers(student)}
        assert convert_(student) == blocks
        packed = run.family.predict(student, *inputs)
    for fqn, weight in weights.items():
        layer = student.get_submodule(fqn)
        assert isinstance(layer, PackedLinear)
        assert torch.equal(layer.dequantize(), weight)
    # The integer path rounds differently in the last bits, and a code may flip at a tie.
    assert (packed - trained).abs().mean() <= 2e-3 * trained.abs().mean()


@pytest.mark.parametrize("name", FAMILIES)
def test_training_lowers_the_loss(name: str) -> None:
    run, losses = trainer(name, settings(steps=20, phase=5, final=25)), []
    run.run(60, lambda _, r: losses.append(r.loss))
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("cut", [2, 3, 5, 6, 9, 11])  # inside hold, at its end, inside and between phases, after Φ
def test_stop_and_continue_equals_uninterrupted(tmp_path: Path, cut: int, ema: float | None) -> None:
    params = settings(ema_decay=ema)
    whole, rows = trainer("wan", params), []
    whole.run(SCHEDULE.total_steps, lambda _, r: rows.append(r.loss))

    first = trainer("wan", params)
    first.run(cut)
    save_training_state(tmp_path / "state.safetensors", first.student, first.optimizer, first.average, first.step)
    second, continued = trainer("wan", params), []
    second.step = load_training_state(tmp_path / "state.safetensors", second.student, second.optimizer, second.average)
    assert second.step == cut
    second.run(SCHEDULE.total_steps, lambda _, r: continued.append(r.loss))
    assert continued == rows[cut:]
    assert_same(state(whole), state(second))
    assert_same(whole.finish().state_dict(), second.finish().state_dict())


def test_damaged_or_foreign_state_is_refused(tmp_path: Path) -> None:
    run, path = trainer("wan"), tmp_path / "state.safetensors"
    save_training_state(path, run.student, run.optimizer, None, 0)
    other = trainer("wan", settings("kd", steps=2, final=0))
    with pytest.raises(ValueError, match="another method or rank"):
        load_training_state(path, other.student, other.optimizer, None)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a usable training state"):
        load_training_state(path, run.student, run.optimizer, None)


def test_phi_starts_nearer_to_the_teacher() -> None:
    """The mechanism of the paper: with Φ the first loss is lower, and at full rank with A16 it vanishes."""
    scheme = QuantScheme(timestep_groups=1, input_activations=None)
    teacher, family, data = subject("wan")
    losses = {}
    for rank in (0, 4, 1000):
        student = copy.deepcopy(teacher)
        prepare_(student, scheme, default_targets=family.default_targets)
        if rank:
            add_phi_(student, rank)
        run = Trainer(student, teacher, family, data, SETTINGS)
        with torch.no_grad():
            losses[rank] = run._loss(0).item()
    assert losses[4] < losses[0]
    assert losses[1000] < 1e-6 * losses[0]


def test_each_sample_is_quantized_by_its_own_timestep() -> None:
    """A batch of two timesteps equals the two samples alone; the public code takes the first sample's group for all."""
    run = trainer("wan", settings("kd", steps=1, final=0))
    for _, layer in qat_layers(run.student):
        assert layer.input_quantizer is not None
        with torch.no_grad():
            layer.input_quantizer.clip_lower_logit.copy_(torch.linspace(-1, 3, 5))
            layer.input_quantizer.clip_upper_logit.copy_(torch.linspace(3, -1, 5))
    x, t, text = run.data.latents[:2], torch.tensor([150.0, 850.0]), run.data.embeddings[:2]
    with torch.no_grad():
        both = run.family.predict(run.student, x, t, text)
        alone = [run.family.predict(run.student, x[i : i + 1], t[i : i + 1], text[i : i + 1]) for i in range(2)]
        swapped = run.family.predict(run.student, x, t.flip(0), text)
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-3, atol=1e-3)
    assert (both - swapped).abs().mean() > 10 * (both - torch.cat(alone)).abs().mean()


def test_quantizer_parameters_are_never_decayed() -> None:
    run = trainer("wan")
    groups = {g["name"]: g for g in build_optimizer(run.student, SETTINGS.qat).param_groups}
    assert {n: g["weight_decay"] for n, g in groups.items()} == {
        "weights": 1e-4,
        "vectors": 0.0,
        "quantizers": 0.0,
        "clips": 0.0,
    }
    layers = [layer for _, layer in qat_layers(run.student)]
    assert len(groups["quantizers"]["params"]) == 2 * len(layers) == len(groups["clips"]["params"])
    assert any(p is layers[0].phi.phi_up for p in groups["weights"]["params"])  # type: ignore[union-attr]
    assert sum(len(g["params"]) for g in groups.values()) == len(list(run.student.parameters()))


def test_learning_rate_is_above_zero_when_phi_is_gone() -> None:
    """The public code removes Φ 2-3 steps before the end, at a learning rate near zero."""
    left = [
        learning_rate_factor(s, SCHEDULE.total_steps, SETTINGS.qat) for s in range(SCHEDULE.decay_end, SCHEDULE.total_steps)
    ]
    assert len(left) == SCHEDULE.final_steps and min(left) >= SETTINGS.qat.final_learning_rate
    assert learning_rate_factor(1, 100, SETTINGS.qat) == pytest.approx(0.2)
    assert learning_rate_factor(99, 100, SETTINGS.qat) == pytest.approx(0.1)


def test_loss_that_is_not_finite_stops_before_the_step() -> None:
    run = trainer("wan")
    run.data.latents[:] = float("nan")
    before = state(run)
    with pytest.raises(FloatingPointError, match="step 0"):
        run.run(1)
    assert_same(before, state(run))


def test_gradients_that_are_not_finite_stop_before_the_step() -> None:
    run = trainer("wan")
    before = state(run)
    next(run.student.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match=r"loss is 0\.\d+, the norm of its gradient (inf|nan) at step 0"):
        run.run(1)
    assert_same(before, state(run))


def test_every_sample_of_a_run_depends_on_seed_and_step_only() -> None:
    a, b = trainer("wan"), trainer("wan")
    with torch.no_grad():
        assert a._loss(7).item() == b._loss(7).item() != a._loss(8).item()
        other = trainer("wan", SETTINGS.model_copy(update={"seed": 1}))
        assert other._loss(7).item() != a._loss(7).item()


def test_record_has_the_columns_of_the_metrics_file() -> None:
    from stages.runtime.training import COLUMNS

    assert tuple(StepRecord(0, 1.0, 1.0, 4, 1.0, 1e-3, 0.1).as_dict()) == COLUMNS


def test_set_phi_is_idempotent() -> None:
    run = trainer("wan")
    set_phi_(run.student, SCHEDULE.at(5))
    once = state(run)
    assert set_phi_(run.student, SCHEDULE.at(5)) == {}
    assert_same(once, state(run))
