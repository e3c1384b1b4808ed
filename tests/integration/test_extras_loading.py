"""Packed pipelines of svdquant and viditq: calibrated, exported, loaded by plain diffusers, saved again, and refused when
damaged."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from qvgen.checkpoint.grids import load_grids, save_grids
from qvgen.checkpoint.packed import export_pipeline, load_packed_transformer, verify_folder
from qvgen.checkpoint.pipeline import load_pipeline
from qvgen.integrations.fused import fuse_
from qvgen.methods.registry import METHODS
from qvgen.models.registry import load_family
from qvgen.models.tiny import TINY_CLIP, TINY_PROMPT, tiny_pipeline
from qvgen.nn.packed_linear import packed_layers
from qvgen.nn.swap import convert_, prepare_
from qvgen.nn.targets import match_linears
from qvgen.packing.config import from_config
from qvgen.packing.layout import EXACT_NAMES, packed_bytes
from qvgen.quant.scheme import QuantScheme
from qvgen.quant.search.settings import SearchSettings
from qvgen.sampling.sample import generate
from qvgen.training.recorder import InputRecorder

pytestmark = pytest.mark.integration

GROUPS = 2
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
# Loaded models differ from saved ones in the last bits, unquantized ones too: other memory, other vector tails.
SAVE_LOAD_TOLERANCE = 1e-5
SETTINGS = SearchSettings(weight_candidates=10, mse_exponent=2.4, clip_candidates=(0.95, 0.8, 0.6))
CASES = [(method, family) for method in ("svdquant", "viditq") for family in ("wan", "cogvideox")]


class Packed:
    """A tiny source pipeline, its transformer calibrated by `method` and converted, and the folder it was exported to."""

    def __init__(self, root: Path, method: str, family: str) -> None:
        self.source, self.folder = tiny_pipeline(family, root / "source"), root / "packed"
        self.family, self.transformer = load_family(self.source), load_pipeline(self.source).transformer
        changes = dict(METHODS[method].extras)
        if "input_rotation" in changes:
            changes["input_rotation"] = 4  # what divides 12, 24 and 40
        self.scheme = QuantScheme(timestep_groups=GROUPS, **changes)
        names = match_linears(self.transformer, (), (), self.family.default_targets)
        layers = {name: self.transformer.get_submodule(name) for name in names}
        recorder = InputRecorder(GROUPS, 64)
        with recorder.attached(layers):
            recorder.group = torch.tensor([0, 1])
            predict(self, self.transformer)
        grids = {}
        for name, layer in layers.items():
            inputs = [recorder.inputs(name, group) for group in range(GROUPS)]
            grids[name] = METHODS[method].search(layer.weight, inputs, self.scheme, SETTINGS)
        save_grids(root / "grids.safetensors", grids)
        grids = load_grids(root / "grids.safetensors")
        prepare_(self.transformer, self.scheme, default_targets=self.family.default_targets, grids=grids)
        self.trained = copy.deepcopy(self.transformer)
        self.names = convert_(self.transformer)
        export_pipeline(self.source, self.transformer, self.scheme, self.folder, torch.bfloat16, method)


@torch.no_grad()
def predict(packed: Packed, model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 4, 4, 4) if packed.family.name == "cogvideox" else (2, 4, 3, 4, 4)
    latents, text = torch.randn(shape, generator=generator), torch.randn(2, 8, 16, generator=generator)
    timestep = torch.tensor([30.0, 900.0])
    return packed.family.predict(model, latents.to(model.dtype), timestep, text.to(model.dtype)).float()


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return Packed(tmp_path_factory.mktemp("pipelines"), *request.param)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return Packed(tmp_path_factory.mktemp("wan"), "svdquant", "wan")


def test_the_loaded_model_computes_what_was_converted(packed: Packed) -> None:
    model = type(packed.transformer).from_pretrained(packed.folder / "transformer")
    stored, loaded = load_file(packed.folder / WEIGHTS), model.state_dict()
    assert loaded.keys() == stored.keys() == packed.transformer.state_dict().keys()
    assert [name for name in loaded if not torch.equal(loaded[name], stored[name].to(loaded[name].dtype))] == []
    rounded = copy.deepcopy(packed.transformer)
    rounded.load_state_dict(stored)
    torch.testing.assert_close(
        predict(packed, model), predict(packed, rounded), rtol=SAVE_LOAD_TOLERANCE, atol=SAVE_LOAD_TOLERANCE
    )


def test_the_file_holds_what_calibration_found(packed: Packed) -> None:
    """input_scale to the last bit in float32, the factors to the last bit in the file's bfloat16."""
    stored = load_file(packed.folder / WEIGHTS)
    trained = dict(packed.trained.named_modules())
    for name in packed.names:
        transform = trained[name].input_transform
        assert stored[f"{name}.input_scale"].dtype == torch.float32
        assert torch.equal(stored[f"{name}.input_scale"], transform.input_scale)
        for factor in ("low_rank_up", "low_rank_down"):
            wanted = getattr(transform, factor)
            assert (wanted is None) == (f"{name}.{factor}" not in stored)
            if wanted is not None:
                assert stored[f"{name}.{factor}"].dtype == torch.bfloat16
                assert torch.equal(stored[f"{name}.{factor}"].float(), wanted)


def test_every_tensor_is_counted(packed: Packed) -> None:
    stored = load_file(packed.folder / WEIGHTS)
    for name, layer in packed_layers(packed.transformer):
        own = sum(tensor.nbytes for key, tensor in stored.items() if key.startswith(f"{name}."))
        assert own == packed_bytes(layer.in_features, layer.out_features, packed.scheme, layer.bias is not None)


def test_the_folder_says_what_it_costs(packed: Packed) -> None:
    config = json.loads((packed.folder / "transformer/config.json").read_text())["quantization_config"]
    scheme, count = from_config(config)
    assert scheme.extras == packed.scheme.extras and count == len(packed.names)
    card = (packed.folder / "README.md").read_text()
    assert "divided by a stored vector" in card
    assert ("16-bit branch, of rank 32" in card) == bool(packed.scheme.low_rank)
    assert ("Hadamard blocks of 4" in card) == bool(packed.scheme.input_rotation)
    assert verify_folder(packed.folder) == len(packed.names)


def test_bfloat16_leaves_scale_and_codes_alone(packed: Packed) -> None:
    model = type(packed.transformer).from_pretrained(packed.folder / "transformer", torch_dtype=torch.bfloat16)
    original = dict(packed_layers(packed.transformer))
    for name, layer in packed_layers(model):
        for tensor in EXACT_NAMES:
            before, after = getattr(original[name], tensor), getattr(layer, tensor)
            assert after.dtype == before.dtype and torch.equal(after, before)
        assert layer.low_rank_up is None or layer.low_rank_up.dtype == torch.bfloat16
    assert predict(packed, model).isfinite().all()
    assert predict(packed, copy.deepcopy(load_packed_transformer(packed.folder)).to(torch.bfloat16)).isfinite().all()


def test_saving_again_changes_nothing(packed: Packed, tmp_path: Path) -> None:
    model = type(packed.transformer).from_pretrained(packed.folder / "transformer", torch_dtype=torch.bfloat16)
    predict(packed, model)
    model.save_pretrained(tmp_path / "transformer")
    stored, again = load_file(packed.folder / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert stored.keys() == again.keys()
    assert [name for name in stored if not torch.equal(stored[name], again[name].to(stored[name].dtype))] == []


def test_the_whole_pipeline_samples(packed: Packed) -> None:
    index = json.loads((packed.folder / "model_index.json").read_text())
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(packed.folder)
    pipeline.set_progress_bar_config(disable=True)
    videos = [
        generate(pipeline, packed.family, [TINY_PROMPT], [0], TINY_CLIP, inference_steps=2, guidance_scale=3.0)
        for _ in range(2)
    ]
    assert videos[0].isfinite().all()
    assert torch.equal(*videos)


def test_a_fused_block_is_the_layers_own(packed: Packed) -> None:
    fused = copy.deepcopy(packed.transformer)
    assert fuse_(fused) == 2
    expected = predict(packed, packed.transformer)
    # 4 bits: a rounding may move a code by one, a fifteenth of a token's range.
    assert (predict(packed, fused) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("method", ["svdquant", "viditq"])
def test_it_compiles_without_a_graph_break(method: str, tmp_path: Path) -> None:
    packed = Packed(tmp_path, method, "wan")
    model = load_packed_transformer(packed.folder)
    expected = predict(packed, model)
    torch.compiler.reset()
    packed_ = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(predict(packed, packed_), expected)


Q = "blocks.1.attn1.to_q"
DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing scale": (lambda t: t.pop(f"{Q}.input_scale"), rf"lacks 1 tensors \({Q}.input_scale\)"),
    "missing factor": (lambda t: t.pop(f"{Q}.low_rank_up"), rf"lacks 1 tensors \({Q}.low_rank_up\)"),
    "bf16 scale": (
        lambda t: t.update({f"{Q}.input_scale": t[f"{Q}.input_scale"].bfloat16()}),
        rf"{Q}.input_scale: expected \[24\] torch.float32, found \[24\] torch.bfloat16",
    ),
    "negative scale": (lambda t: t[f"{Q}.input_scale"].neg_(), rf"{Q}.input_scale: scales must be positive"),
    "NaN factor": (lambda t: t[f"{Q}.low_rank_down"].fill_(torch.nan), rf"{Q}.low_rank_down: holds NaN"),
    "cut scale": (lambda t: t.update({f"{Q}.input_scale": torch.ones(3)}), rf"{Q}.input_scale: expected shape \[24\]"),
    "another rank": (
        lambda t: t.update({f"{Q}.low_rank_up": torch.ones(24, 2)}),
        rf"{Q}.low_rank_up expected shape torch.Size\(\[24, 1\]\), but got torch.Size\(\[24, 2\]\)",  # diffusers' words
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, wan: Packed, tmp_path: Path) -> None:
    folder, (edit, said) = Path(shutil.copytree(wan.folder, tmp_path / "packed")), DAMAGES[damage]
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=said):
        verify_folder(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input_scaling": False}, r"holds 20 tensors \(blocks.0.attn1.to_k.input_scale, .*no place for"),
        ({"input_rotation": 16}, "in_features 24 is not a multiple of input_rotation 16"),
        ({"input_rotation": 12}, "input_rotation must be a power of two"),
    ],
)
def test_an_edited_config_is_refused(
    changes: dict[str, Any], said: str, wan: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QVGEN_VERIFY", "0")
    folder = Path(shutil.copytree(wan.folder, tmp_path / "packed"))
    path = folder / "transformer/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"] |= changes
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        verify_folder(folder)


def test_export_with_another_scheme_is_refused(wan: Packed, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was packed with another scheme"):
        export_pipeline(wan.source, wan.transformer, wan.scheme.without_extras(), tmp_path / "out", torch.bfloat16)
