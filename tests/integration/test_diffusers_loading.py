"""Packed pipelines of both families: export, plain diffusers loading, saving again, and everything that must be refused."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.quantizers import auto
from safetensors.torch import load_file, save_file

import qvgen.integrations.diffusers as integration
from qvgen.checkpoint.packed import export_pipeline, load_packed_transformer, verify_folder
from qvgen.checkpoint.pipeline import load_pipeline
from qvgen.models.family import Family
from qvgen.models.registry import load_family
from qvgen.models.tiny import TINY_CLIP, TINY_PROMPT, tiny_pipeline
from qvgen.nn.packed_linear import packed_layers
from qvgen.nn.swap import convert_, prepare_
from qvgen.packing.config import from_config, to_config
from qvgen.packing.layout import PACKED_NAMES
from qvgen.quant.scheme import QuantArgs, QuantScheme
from qvgen.sampling import one_batch
from qvgen.sampling.sample import generate

pytestmark = pytest.mark.integration

SCHEME = QuantScheme(timestep_groups=4)
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
# Loaded models differ from saved ones in the last bits, unquantized ones too: other memory, other vector tails.
SAVE_LOAD_TOLERANCE = 1e-5
CASES = [("wan", False), ("cogvideox", False), ("cogvideox", True)]


class Packed:
    """A tiny source pipeline, its converted transformer, and the folder they were exported to."""

    def __init__(
        self, root: Path, family: str, rotary: bool, scheme: QuantScheme = SCHEME, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.source, self.folder = tiny_pipeline(family, root / "source", rotary=rotary), root / "packed"
        self.family: Family = load_family(self.source)
        self.transformer = load_pipeline(self.source).transformer
        prepare_(self.transformer, scheme, default_targets=self.family.default_targets)
        self.names = convert_(self.transformer)
        export_pipeline(self.source, self.transformer, scheme, self.folder, dtype)


@pytest.fixture(scope="module", params=CASES, ids=["wan", "cogvideox", "cogvideox-rotary"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return Packed(tmp_path_factory.mktemp("pipelines"), *request.param)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return Packed(tmp_path_factory.mktemp("wan"), "wan", rotary=False)


@pytest.fixture
def damaged(wan: Packed, tmp_path: Path) -> Path:
    """A copy of a good packed pipeline, to be damaged by the test."""
    return Path(shutil.copytree(wan.folder, tmp_path / "packed"))


def model_class(packed: Packed) -> Any:
    return type(packed.transformer)


@torch.no_grad()
def predict(packed: Packed, model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 4, 4, 4) if packed.family.name == "cogvideox" else (2, 4, 3, 4, 4)
    latents, text = torch.randn(shape, generator=generator), torch.randn(2, 8, 16, generator=generator)
    timestep = torch.tensor([30.0, 900.0])
    return packed.family.predict(model, latents.to(model.dtype), timestep, text.to(model.dtype)).float()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []


def test_the_folder_is_the_source_with_another_transformer(packed: Packed) -> None:
    files = {f.relative_to(packed.source) for f in packed.source.rglob("*") if f.is_file()}
    for file in files:
        if file.parts[0] != "transformer":
            assert (packed.folder / file).read_bytes() == (packed.source / file).read_bytes()
    assert files | {Path("README.md")} == {f.relative_to(packed.folder) for f in packed.folder.rglob("*") if f.is_file()}
    card = (packed.folder / "README.md").read_text()
    assert "W4A4" in card
    assert f"{len(packed.names)} linear layers" in card


def test_config_names_every_layer(packed: Packed) -> None:
    config = json.loads((packed.folder / "transformer/config.json").read_text())["quantization_config"]
    scheme, count = from_config(config)
    assert list(scheme.targets) == packed.names
    assert count == len(packed.names) == sum(1 for _ in packed_layers(packed.transformer))
    assert "_name_or_path" not in json.loads((packed.folder / "transformer/config.json").read_text())


def test_export_is_deterministic(packed: Packed, tmp_path: Path) -> None:
    export_pipeline(packed.source, copy.deepcopy(packed.transformer), SCHEME, tmp_path / "again", torch.bfloat16)
    for file in packed.folder.rglob("*"):
        if file.is_file():
            assert (tmp_path / "again" / file.relative_to(packed.folder)).read_bytes() == file.read_bytes()


def test_stored_dtypes(packed: Packed) -> None:
    original = packed.transformer.state_dict()
    for name, tensor in load_file(packed.folder / WEIGHTS).items():
        if name.rpartition(".")[2] in PACKED_NAMES:
            assert torch.equal(tensor, original[name])
        else:
            assert tensor.dtype == torch.bfloat16


def test_loads_in_float32_by_default(packed: Packed) -> None:
    stored = load_file(packed.folder / WEIGHTS)
    model = model_class(packed).from_pretrained(packed.folder / "transformer")
    assert model.dtype == torch.float32
    assert not model.training
    loaded = model.state_dict()
    assert loaded.keys() == stored.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == (torch.float32 if stored[name].is_floating_point() else stored[name].dtype)
        assert torch.equal(tensor, stored[name].to(tensor.dtype))
    # The converted model, once its other tensors were rounded to what is stored, computes the same.
    rounded = copy.deepcopy(packed.transformer)
    rounded.load_state_dict(stored)
    torch.testing.assert_close(
        predict(packed, model), predict(packed, rounded), rtol=SAVE_LOAD_TOLERANCE, atol=SAVE_LOAD_TOLERANCE
    )


def test_packed_tensors_are_exact_in_bfloat16(packed: Packed) -> None:
    model = model_class(packed).from_pretrained(packed.folder / "transformer", torch_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    original = dict(packed_layers(packed.transformer))
    for name, layer in packed_layers(model):
        assert torch.equal(layer.dequantize(), original[name].dequantize())
        for tensor in PACKED_NAMES:
            before, after = getattr(original[name], tensor), getattr(layer, tensor)
            assert after.dtype == before.dtype
            assert torch.equal(after, before)
        assert layer.bias is None or layer.bias.dtype == torch.bfloat16
    kept = model._keep_in_fp32_modules or []
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if set(kept) & set(name.split(".")) else torch.bfloat16), name
    assert predict(packed, model).isfinite().all()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saving_again_changes_nothing(packed: Packed, tmp_path: Path, dtype: torch.dtype | None) -> None:
    model = model_class(packed).from_pretrained(packed.folder / "transformer", torch_dtype=dtype)
    model.save_pretrained(tmp_path / "transformer")
    assert_same(load_file(tmp_path / WEIGHTS), model.state_dict())
    stored, again = load_file(packed.folder / WEIGHTS), load_file(tmp_path / WEIGHTS)
    # Values as stored; what was stored in bfloat16 and loaded into float32 is now saved as that.
    assert_same({n: t.to(stored[n].dtype) for n, t in again.items()}, stored)
    configs = [json.loads((folder / "transformer/config.json").read_text()) for folder in (packed.folder, tmp_path)]
    configs[1].pop("_name_or_path")  # diffusers writes down where a model came from
    assert configs[0] == configs[1]
    model.save_pretrained(tmp_path / "third")
    twice = model_class(packed).from_pretrained(tmp_path / "transformer", torch_dtype=dtype)
    assert_same(twice.state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_pipeline_loads_and_samples(packed: Packed, dtype: torch.dtype) -> None:
    index = json.loads((packed.folder / "model_index.json").read_text())
    arguments = {} if dtype == torch.float32 else {"dtype": dtype}
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(packed.folder, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer.dtype == dtype
    videos = [
        generate(pipeline, packed.family, [TINY_PROMPT], [seed], TINY_CLIP, inference_steps=2, guidance_scale=3.0)
        for seed in (0, 0, 1)
    ]
    assert videos[0].isfinite().all()
    assert torch.equal(videos[0], videos[1])
    assert not torch.equal(videos[0], videos[2])


def test_the_timestep_reaches_the_layers(packed: Packed) -> None:
    model = load_packed_transformer(packed.folder)
    for _, layer in packed_layers(model):
        layer.input_clip_upper.copy_(torch.tensor([0.5, 1.0, 1.0, 1.0]))
    both = predict(packed, model)
    for _, layer in packed_layers(model):
        layer.input_clip_upper.fill_(1.0)
    unclipped = predict(packed, model)
    assert not torch.allclose(both[0], unclipped[0], atol=1e-3)  # t = 30: the first group
    torch.testing.assert_close(both[1], unclipped[1])  # t = 900: the last


def test_the_loaded_model_can_be_cast_and_copied(packed: Packed) -> None:
    model = load_packed_transformer(packed.folder)
    expected = predict(packed, model)
    twin = copy.deepcopy(model).to(torch.bfloat16)
    assert twin.dtype == torch.bfloat16
    assert_same(*({n: t for n, t in m.state_dict().items() if n.rpartition(".")[2] in PACKED_NAMES} for m in (model, twin)))
    assert predict(packed, twin).isfinite().all()
    assert torch.equal(predict(packed, model), expected)


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(weights=QuantArgs(num_bits=3, symmetric=True), timestep_groups=1),
        QuantScheme(weights=QuantArgs(strategy="group", group_size=8), timestep_groups=2),
        QuantScheme(weights=QuantArgs(num_bits=8, strategy="tensor"), input_activations=None),
        QuantScheme(targets=(r"re:blocks\.\d+\.ffn",), ignore=("blocks.0.ffn.net.2",), timestep_groups=2),
    ],
    ids=["w3-symmetric", "group", "weight-only", "some-layers"],
)
def test_other_schemes(scheme: QuantScheme, tmp_path: Path) -> None:
    packed = Packed(tmp_path, "wan", rotary=False, scheme=scheme, dtype=torch.float32)
    assert verify_folder(packed.folder) == len(packed.names)
    model = load_packed_transformer(packed.folder)
    assert_same(model.state_dict(), packed.transformer.state_dict())
    torch.testing.assert_close(
        predict(packed, model), predict(packed, packed.transformer), rtol=SAVE_LOAD_TOLERANCE, atol=SAVE_LOAD_TOLERANCE
    )


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "transformer/config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


Q = "blocks.1.attn1.to_q"
DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing scale": (lambda t: t.pop(f"{Q}.weight_scale"), rf"lacks 1 tensors \({Q}.weight_scale\)"),
    "missing bias": (lambda t: t.pop(f"{Q}.bias"), rf"lacks 1 tensors \({Q}.bias\)"),
    "missing other": (lambda t: t.pop("proj_out.weight"), r"lacks 1 tensors \(proj_out.weight\)"),
    "left over": (lambda t: t.update({f"{Q}.weight": torch.ones(2)}), rf"holds 1 tensors \({Q}.weight\).* no place for"),
    "flipped code": (lambda t: t[f"{Q}.weight_packed"][3, 1:2].bitwise_xor_(4), rf"{Q}.weight_packed: .*do not add up"),
    "bf16 scale": (
        lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"].bfloat16()}),
        rf"{Q}.weight_scale: expected .* torch.float32, found .* torch.bfloat16",
    ),
    "NaN scale": (lambda t: t[f"{Q}.weight_scale"].fill_(torch.nan), rf"{Q}.weight_scale: holds NaN"),
    "NaN elsewhere": (lambda t: t["proj_out.weight"].fill_(torch.nan), "proj_out.weight: holds NaN"),
    "cut clips": (
        lambda t: t.update({f"{Q}.input_clip_lower": torch.ones(3)}),
        rf"{Q}.input_clip_lower: expected shape \[4\]",
    ),
    "transposed": (
        lambda t: t.update({f"{Q}.weight_packed": t[f"{Q}.weight_packed"].T.contiguous()}),
        rf"{Q}.weight_packed: expected shape \[24, 3\], found \[3, 24\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, damaged: Path) -> None:
    edit, said = DAMAGES[damage]
    edit_weights(damaged, edit)
    with pytest.raises(ValueError, match=said):
        verify_folder(damaged)
    if damage != "NaN elsewhere":  # what is not packed is diffusers' business
        with pytest.raises(ValueError, match=said):
            diffusers.WanTransformer3DModel.from_pretrained(damaged / "transformer")


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_a_truncated_file_is_named(damaged: Path, keep: int) -> None:
    data = (damaged / WEIGHTS).read_bytes()
    (damaged / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.safetensors is truncated or damaged"):
        verify_folder(damaged)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda c: c.update(format_version=2), "packed format version 2; this qvgen reads version 1"),
        (lambda c: c["config_groups"]["group_0"].update(num_targets=19), "says 19 packed layers .* select 20"),
        (lambda c: c["config_groups"]["group_0"]["targets"].pop(), "says 20 packed layers .* select 19"),
        (lambda c: c["config_groups"]["group_0"]["targets"].append("blocks.7.q"), "'blocks.7.q' matches no linear layer"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=3), r"weight_packed: expected shape"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=9), r"less than or equal to 8"),
        (lambda c: c.clear(), "is not packed: config.json of its transformer has no qvgen quantization_config"),
    ],
)
def test_an_edited_config_is_refused(
    damaged: Path, edit: Callable[[dict[str, Any]], Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing is compared with what the files record (tests/unit/checkpoint/test_record.py)."""
    monkeypatch.setenv("QVGEN_VERIFY", "0")
    edit_config(damaged, edit)
    with pytest.raises(ValueError, match=said):
        verify_folder(damaged)


def test_folders_that_are_not_packed_pipelines(wan: Packed, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a diffusers pipeline: it has no model_index\.json"):
        verify_folder(tmp_path)
    with pytest.raises(ValueError, match="is not packed"):
        load_packed_transformer(wan.source)
    with pytest.raises(ValueError, match=r"has no transformer/config.json"):
        load_packed_transformer(tmp_path)


def test_export_refuses(wan: Packed, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no packed layers: call convert_ first"):
        export_pipeline(wan.source, load_pipeline(wan.source).transformer, SCHEME, tmp_path / "a", torch.bfloat16)
    with pytest.raises(ValueError, match="was packed with another scheme"):
        other = SCHEME.model_copy(update={"timestep_groups": 5})
        export_pipeline(wan.source, wan.transformer, other, tmp_path / "b", torch.bfloat16)
    with pytest.raises(ValueError, match="is not empty"):
        export_pipeline(wan.source, wan.transformer, SCHEME, wan.folder, torch.bfloat16)


def test_shards(wan: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvgen.checkpoint.packed._MAX_SHARD_SIZE", "20KB")
    export_pipeline(wan.source, wan.transformer, SCHEME, tmp_path / "out", torch.bfloat16)
    assert len(list((tmp_path / "out/transformer").glob("*.safetensors"))) > 1
    assert verify_folder(tmp_path / "out") == len(wan.names)
    assert_same(load_packed_transformer(tmp_path / "out").state_dict(), load_packed_transformer(wan.folder).state_dict())


def test_the_card_keeps_the_base_models_name_and_licence(wan: Packed, tmp_path: Path) -> None:
    source = Path(shutil.copytree(wan.source, tmp_path / "source"))
    (source / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: someone/model\n---\n\n# A model\n\nText.\n")
    export_pipeline(source, wan.transformer, SCHEME, tmp_path / "out", torch.bfloat16, method="mse")
    card = (tmp_path / "out/README.md").read_text()
    for said in ("license: apache-2.0", "base_model: someone/model", "| licence | apache-2.0 |", "| method | mse |"):
        assert said in card


def test_registering_again_is_harmless_and_a_foreign_entry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    integration.register()
    assert auto.AUTO_QUANTIZER_MAPPING["qvgen"] is integration.QVGenQuantizer
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "qvgen", auto.GGUFQuantizer)
    with pytest.raises(RuntimeError, match=r"already has a quantizer 'qvgen', .*GGUFQuantizer"):
        integration.register()


def test_a_full_precision_model_is_not_quantized_on_the_fly(wan: Packed) -> None:
    config = integration.QVGenConfig(**to_config(SCHEME, 20))
    with pytest.raises(ValueError, match="require the model to be pre-quantized"):
        diffusers.WanTransformer3DModel.from_pretrained(wan.source / "transformer", quantization_config=config)


def test_what_the_card_shows_is_what_was_scored(wan: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snippet of a model with a guidance stop samples the video that evaluation scores; without the stop it would not.
    Evaluation's batches are too large for one_batch.py, so each evaluation is a call, as in the snippet."""
    monkeypatch.setattr(one_batch, "MOST_TOKENS", 0)
    stop, how = 0.3, {"inference_steps": 5, "guidance_scale": 3.0}
    folder = tmp_path / "packed"
    export_pipeline(wan.source, wan.transformer, SCHEME, folder, torch.float32, "dsa", stop)
    assert json.loads((folder / "generation.json").read_text()) == {"guidance_stop": stop}
    snippet = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert f"callback_on_step_end=stop_guidance({stop})" in snippet
    size = "height=32, width=32, num_frames=9, max_sequence_length=8, num_inference_steps=5, guidance_scale=3.0"
    seed = 'generator=torch.Generator().manual_seed(0), output_type="latent"'
    snippet = snippet.replace("path/to/this/folder", str(folder)).replace('"a prompt"', f'"{TINY_PROMPT}", {size}, {seed}')
    shown: dict[str, Any] = {"torch": torch}
    exec(snippet, shown)
    pipeline = load_pipeline(folder)
    scored = generate(pipeline, wan.family, [TINY_PROMPT], [0], TINY_CLIP, guidance_stop=stop, **how)
    guided = generate(pipeline, wan.family, [TINY_PROMPT], [0], TINY_CLIP, **how)
    assert torch.equal(shown["video"], scored) and not torch.equal(scored, guided)


def test_the_exported_files_follow_the_umask(wan: Packed, tmp_path: Path) -> None:
    import stat

    (tmp_path / "probe").write_text("")
    mode = stat.S_IMODE((tmp_path / "probe").stat().st_mode)
    export_pipeline(wan.source, wan.transformer, SCHEME, tmp_path / "packed", torch.float32)
    modes = {f: stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "packed").rglob("*") if f.is_file()}
    assert modes and {f for f, found in modes.items() if found != mode} == set()
