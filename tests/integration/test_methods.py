"""Every method from calibration to a packed folder that diffusers loads, on the two-layer models of every family."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from qvgen.checkpoint.packed import export_pipeline, load_packed_transformer
from qvgen.checkpoint.pipeline import load_pipeline, load_transformer
from qvgen.checkpoint.training import load_training_state, save_training_state
from qvgen.data.latents import LatentDataset, save_text
from qvgen.evaluation.quality.modules import module_errors
from qvgen.methods.registry import METHODS
from qvgen.models.registry import load_family
from qvgen.models.tiny import TINY_CLIP, TINY_PROMPT
from qvgen.nn.swap import add_adapters_, convert_, merge_adapters_, prepare_, qat_layers
from qvgen.params import Params, validate_params
from qvgen.quant.scheme import QuantScheme
from qvgen.sampling import one_batch
from qvgen.sampling.sample import generate, sample
from qvgen.training.batches import Batches
from qvgen.training.calibration import record_inputs
from qvgen.training.loop import Trainer
from qvgen.training.recipe import Sources, build_trainer, calibrate, finish
from tests.support.families import KINDS, make_kind

ROOT = Path(__file__).parents[2]
FAMILIES = ("wan", "wan_image", "cogvideox", "ltx")
# They differ in what noise is added to, and in layout: one method shows it.
OTHERS = ("wan_experts", "wan_image_experts", "wan_image_expand", "wan_vace", "pixart")
OTHERS += ("flux", "flux_schnell", "hunyuan_video", "sana", "qwen_image", "stable_diffusion_3")
FROM_DATA = ("finetune", "lsq")  # learn what the data say, away from a random teacher
UNTRAINED = ("rtn", "mse", "svdquant", "viditq")
PACKED_TOLERANCE = 5e-3  # mean difference over mean output: the integer path rounds in another order, a code may flip

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", params=FAMILIES)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A pipeline folder and prepared data of random latents, as stages fetch and prepare leave them."""
    folder = tmp_path_factory.mktemp(request.param)
    return prepare(request.param, folder)


def prepare(name: str, folder: Path) -> SimpleNamespace:
    model, kind = make_kind(name, folder / "model"), KINDS[name]
    captions = [TINY_PROMPT, "a blue digit two moving down"]
    pipeline, family = load_pipeline(model), load_family(model)
    text = torch.cat([family.encode_text(pipeline, [c], TINY_CLIP.max_sequence_length) for c in (*captions, "")])
    for i, part in enumerate(("train", "calibration", "held_out")):
        (folder / "data" / part).mkdir(parents=True)
        latents, _, image = kind.inputs(8, seed=i)
        shard = {"latents": latents, "caption_index": torch.arange(8) % 2} | ({"image": image} if image.numel() else {})
        save_file(shard, folder / "data" / part / "shard-00000.safetensors")
    (folder / "data" / "captions.json").write_text(json.dumps(captions))
    save_text(folder / "data" / "text" / "shard-00000.safetensors", text.detach().float().unbind())
    return SimpleNamespace(family=name, model=model, data=folder / "data")


@pytest.mark.parametrize("method", ["qvgen", "qvgen+"])
def test_training_reads_nothing_but_transformers(
    prepared: SimpleNamespace, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text encoder may be larger than what is trained: it is read neither by calibration nor by training."""
    import diffusers
    import transformers

    read = []
    for base in (diffusers.ModelMixin, transformers.PreTrainedModel):
        original = base.from_pretrained.__func__

        def recorded(cls: type, *arguments: Any, original: Any = original, **options: Any) -> Any:
            read.append(cls.__name__)
            return original(cls, *arguments, **options)

        monkeypatch.setattr(base, "from_pretrained", classmethod(recorded))
    params, sources = settings(method), Sources(prepared.model, tmp_path / "calibration", prepared.data)
    calibrate(params, sources)
    trainer = build_trainer(params, sources)
    trainer.run(params.schedule.total_steps)
    finish(trainer, params, sources)
    assert len(read) == 3 and len(set(read)) == 1 and read[0].endswith("Transformer3DModel")


def settings(method: str, seed: int = 0) -> Params:
    tree: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    tree |= {"method": method, "seed": seed}
    tree["scheme"]["timestep_groups"] = 2
    if METHODS[method].extras.get("input_rotation"):
        tree["scheme"]["input_rotation"] = 4  # 128 does not divide what is 12 wide
    tree["calibrate"] |= {"tokens_per_group": 64, "weight_candidates": 20}
    tree["qat"] |= {"steps": 4, "batch_size": 4}
    tree["decay"] |= {"initial_rank": 2, "phase_steps": 2, "final_steps": 4}
    return validate_params(tree, "test")


def trained(prepared: SimpleNamespace, params: Params, folder: Path) -> tuple[Trainer, Any, Sources, list]:
    sources, records = Sources(prepared.model, folder / "calibration", prepared.data), []
    calibrate(params, sources)
    trainer = build_trainer(params, sources)
    trainer.run(params.schedule.total_steps, lambda _, record: records.append(record))
    return trainer, finish(trainer, params, sources), sources, records


@pytest.mark.parametrize("method", METHODS)
def test_a_method_gives_a_packed_model_that_loads(prepared: SimpleNamespace, method: str, tmp_path: Path) -> None:
    params = settings(method)
    trainer, student, _, records = trained(prepared, params, tmp_path)
    assert len(records) == (0 if method in UNTRAINED else 12)
    if method == "qvgen":
        assert records[0].rank == 2 and records[-1].rank == 0
    data, timestep = trainer.data, torch.tensor([200.0, 800.0])
    clean, noise = data.latents[:2], torch.randn(data.latents[:2].shape, generator=torch.Generator().manual_seed(0))
    target = trainer.family.target(clean, noise, timestep)
    inputs = trainer.family.add_noise(clean, noise, timestep), timestep, data.text(torch.arange(2)), data.image[:2]
    with torch.no_grad():
        wanted = trainer.family.predict(student, *inputs)
        reference = trainer.family.predict(trainer.teacher, *inputs)
    convert_(student)
    component = trainer.family.component
    packed, scheme = tmp_path / "packed", params.effective_scheme
    export_pipeline(prepared.model, student, scheme, packed, torch.float32, method, component=component)
    loaded = load_packed_transformer(packed, component=component)
    with torch.no_grad():
        found = trainer.family.predict(loaded, *inputs)
    assert (found - wanted).abs().mean() <= PACKED_TOLERANCE * wanted.abs().mean()
    assert (found - reference).square().mean() > 0
    if method in FROM_DATA:
        assert (found - target).square().mean() < (reference - target).square().mean()
    else:
        assert (found - reference).square().mean() < reference.square().mean()


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_layouts_of_a_family(name: str, tmp_path: Path) -> None:
    prepared = prepare(name, tmp_path)
    test_a_method_gives_a_packed_model_that_loads(prepared, "qvgen+", tmp_path)
    config = json.loads((tmp_path / "packed" / load_family(prepared.model).component / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    fractions = KINDS[name].family in ("flux", "qwen_image")  # as timesteps
    assert group.get("max_timestep") == (1.0 if fractions else None)
    other = prepared.model / "transformer"
    if KINDS[name].options.get("experts"):  # the one that was not trained stays as it was
        files = {path.name: path.read_bytes() for path in other.iterdir()}
        assert {path.name: path.read_bytes() for path in (tmp_path / "packed/transformer").iterdir()} == files


@pytest.mark.parametrize(("expert", "own"), [("transformer", [2, 3]), ("transformer_2", [0, 1])])
def test_an_expert_is_calibrated_and_trained_on_its_own_noise_levels(expert: str, own: list[int], tmp_path: Path) -> None:
    """The groups that it never sees have the inputs of the nearest one that it does."""
    prepared, seen = prepare("wan_experts", tmp_path), []
    (prepared.model / "manifest.json").write_text(json.dumps({"expert": expert}))
    params = settings("kd")
    params = params.model_copy(update={"scheme": params.scheme.model_copy(update={"timestep_groups": 4})})
    family, data = load_family(prepared.model), LatentDataset.open(prepared.data / "calibration")
    model = load_transformer(prepared.model, component=family.component)
    model.register_forward_pre_hook(lambda _m, _a, given: seen.extend(given["timestep"].tolist()), with_kwargs=True)
    inputs = record_inputs(model, family, data, params)
    low, high = 250 * own[0], 250 * (own[-1] + 1)
    assert len(seen) == len(data) and {int(t) // 250 for t in seen} == {*own} and all(low <= t < high for t in seen)
    for rows in inputs.values():
        same = [next(i for i in range(4) if torch.equal(rows[i], rows[group])) for group in range(4)]
        assert same == ([0, 0, 0, 3] if own == [2, 3] else [0, 1, 1, 1])
    batches = Batches(data, family, params)
    assert all(low <= t <= high for step in range(20) for t in batches[step][2].tolist())


@pytest.mark.parametrize("method", ["efficientdm", "qvgen", "qvgen+", "qdm"])
def test_stop_and_continue_equals_uninterrupted(prepared: SimpleNamespace, method: str, tmp_path: Path) -> None:
    """Adapters, Φ and scaled inputs all survive in the training state."""
    params = settings(method)
    whole, _, sources, _ = trained(prepared, params, tmp_path)
    first, second = build_trainer(params, sources), build_trainer(params, sources)
    first.run(5)
    save_training_state(tmp_path / "state.safetensors", first.student, first.optimizer, None, first.step)
    second.step = load_training_state(tmp_path / "state.safetensors", second.student, second.optimizer, None)
    second.run(params.schedule.total_steps)
    wanted, found = whole.student.state_dict(), finish(second, params, sources).state_dict()
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


def test_only_adapters_and_quantizers_train_and_merging_changes_nothing(prepared: SimpleNamespace) -> None:
    model, family = load_pipeline(prepared.model).transformer.float(), load_family(prepared.model)
    prepare_(model, QuantScheme(timestep_groups=1), default_targets=family.default_targets)
    add_adapters_(model, torch.Generator().manual_seed(0))
    assert all(".adapter." in n or "_quantizer." in n for n, p in model.named_parameters() if p.requires_grad)
    layer = next(layer for _, layer in qat_layers(model))
    assert layer.adapter is not None
    with torch.no_grad():
        layer.adapter.up.normal_(generator=torch.Generator().manual_seed(1))
    # s B A, by hand; it acts inside the quantizer.
    step = layer.weight_quantizer.scale.detach().mean(1, keepdim=True)
    expected = step * (layer.adapter.up @ layer.adapter.down).detach()
    torch.testing.assert_close(layer.adapter.delta().detach(), expected)
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(2))
    before = layer(x).detach()
    assert not torch.equal(before, nn.functional.linear(x, layer.weight_quantizer(layer.weight), layer.bias).detach())
    with pytest.raises(ValueError, match="have adapters"):
        convert_(model)
    merge_adapters_(model)
    assert layer.adapter is None
    torch.testing.assert_close(layer(x).detach(), before, rtol=1e-5, atol=1e-6)


def test_lsq_leaves_zero_points_where_they_were(prepared: SimpleNamespace, tmp_path: Path) -> None:
    params = settings("lsq")
    _, student, sources, _ = trained(prepared, params, tmp_path)
    start = build_trainer(params, sources).student
    for (name, before), (_, after) in zip(qat_layers(start), qat_layers(student), strict=True):
        assert torch.equal(before.weight_quantizer.zero_point, after.weight_quantizer.zero_point), name
    assert any(
        not torch.equal(before.weight_quantizer.scale, after.weight_quantizer.scale)
        for (_, before), (_, after) in zip(qat_layers(start), qat_layers(student), strict=True)
    )


def test_finetune_trains_without_quantizers(prepared: SimpleNamespace, tmp_path: Path) -> None:
    params = settings("finetune")
    sources = Sources(prepared.model, tmp_path / "calibration", prepared.data)
    calibrate(params, sources)
    trainer = build_trainer(params, sources)
    assert list(qat_layers(trainer.student)) == []
    trainer.run(params.schedule.total_steps)
    student = finish(trainer, params, sources)
    assert len(list(qat_layers(student))) > 0


def test_errors_of_modules(prepared: SimpleNamespace) -> None:
    model, family = load_pipeline(prepared.model).transformer.float(), load_family(prepared.model)
    other = load_pipeline(prepared.model).transformer.float()
    names = prepare_(other, QuantScheme(timestep_groups=1), default_targets=family.default_targets)
    latents, _, image = KINDS[prepared.family].inputs(2)
    text = family.encode_text(load_pipeline(prepared.model), [TINY_PROMPT] * 2, TINY_CLIP.max_sequence_length)
    args = family, latents, text.detach(), torch.tensor([100.0, 800.0]), names
    assert set(module_errors(model, model, *args, seed=0, image=image).values()) == {0.0}
    errors = module_errors(model, other, *args, seed=0, image=image)
    assert all(error > 0 for error in errors.values())
    last = "blocks.1.ffn" if prepared.family.startswith("wan") else "transformer_blocks.1.ff"
    assert last in errors


def test_guidance_stops_where_it_should(prepared: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_batch, "MOST_TOKENS", 0)  # calls are counted: both evaluations in one are test_one_batch.py's
    pipeline, family = load_pipeline(prepared.model), load_family(prepared.model)
    calls: list[float] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: calls.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    arguments: dict[str, Any] = {"inference_steps": 5, "guidance_scale": 3.0}
    arguments["images"] = torch.zeros(1, 3, 32, 32) if family.reads_image else None
    if not family.guidance_can_stop:
        with pytest.raises(ValueError, match="cannot stop guidance"):
            generate(pipeline, family, [TINY_PROMPT], [0], TINY_CLIP, guidance_stop=0.5, **arguments)
        return
    sample(pipeline, family, [TINY_PROMPT], [0], TINY_CLIP, batch_size=1, guidance_stop=0.5, **arguments)
    twice = {t for t in calls if calls.count(t) == 2}
    once = {t for t in calls if calls.count(t) == 1}
    assert len(twice) + len(once) == 5 and twice and once
    assert min(twice) > 500 >= max(once)
    calls.clear()
    sample(pipeline, family, [TINY_PROMPT], [0], TINY_CLIP, batch_size=1, **arguments)
    assert len(calls) == 10
