"""What diffusers can do with any transformer, done with a packed one."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from qvgen.checkpoint.packed import export_pipeline, load_packed_transformer, verify_folder
from qvgen.checkpoint.pipeline import load_transformer
from qvgen.models.registry import load_family
from qvgen.models.tiny import tiny_pipeline
from qvgen.nn.packed_linear import packed_layers
from qvgen.nn.swap import convert_, prepare_
from qvgen.packing.layout import EXACT_NAMES
from qvgen.quant.scheme import QuantScheme

pytestmark = pytest.mark.integration

SCHEME = QuantScheme(timestep_groups=4)
# Tensors at other addresses: PyTorch's own products round by them.
ROUNDING = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed pipeline in a folder with a name that a shell, a URL and an ASCII table would trip over."""
    root = tmp_path_factory.mktemp("features") / "it's a dir; ünïcode & 100% #1"
    source = tiny_pipeline("wan", root / "source")
    family, model = load_family(source), load_transformer(source)
    prepare_(model, SCHEME, default_targets=family.default_targets)
    convert_(model)
    export_pipeline(source, model, SCHEME, root / "packed", torch.float32)
    return root / "packed"


@torch.no_grad()
def predict(folder: Path, model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 3, 4, 4, generator=generator), torch.randn(2, 8, 16, generator=generator)
    timestep = torch.tensor([30.0, 900.0])
    return load_family(folder).predict(model, latents.to(model.dtype), timestep, text.to(model.dtype)).float()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def exact(model: Any) -> dict[str, torch.Tensor]:
    """The packed tensors, which nothing may round."""
    return {
        f"{name}.{leaf}": tensor
        for name, layer in packed_layers(model)
        for leaf, tensor in layer.state_dict().items()
        if leaf in EXACT_NAMES
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_a_path_of_any_characters(folder: Path) -> None:
    assert verify_folder(folder) == 20
    assert predict(folder, load_packed_transformer(folder)).isfinite().all()


@pytest.mark.parametrize("how", [{"max_shard_size": "20KB"}, {"variant": "fp16"}, {"variant": "w4", "max_shard_size": "20KB"}])
def test_saved_in_shards_and_as_a_variant(folder: Path, tmp_path: Path, how: dict[str, str]) -> None:
    model = load_packed_transformer(folder)
    model.save_pretrained(tmp_path, **how)
    variant = how.get("variant")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or "max_shard_size" not in how
    assert all(variant is None or f".{variant}" in path.name for path in tmp_path.glob("*.safetensors"))
    again = WanTransformer3DModel.from_pretrained(tmp_path, variant=variant)
    assert same(again.state_dict(), model.state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "qvgen"


def test_layerwise_casting_leaves_packed_layers_alone(folder: Path) -> None:
    model = load_packed_transformer(folder)
    expected, before = predict(folder, model), {name: tensor.clone() for name, tensor in exact(model).items()}
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert torch.equal(predict(folder, model), expected)  # diffusers spares everything else of Wan: embedders, norms, output
    assert same(exact(model), before)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload(folder: Path, kind: str) -> None:
    model = load_packed_transformer(folder)
    expected, before = predict(folder, model), {name: tensor.clone() for name, tensor in exact(model).items()}
    cpu = torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)
    assert relative(predict(folder, model), expected) < ROUNDING
    assert same(exact(model), before)


def test_another_attention_backend(folder: Path) -> None:
    model = load_packed_transformer(folder)
    expected = predict(folder, model)
    model.set_attention_backend("native")
    assert relative(predict(folder, model), expected) < ROUNDING


def test_the_logical_number_of_parameters(folder: Path) -> None:
    model, full = load_packed_transformer(folder), load_transformer(folder.parent / "source")
    assert model.num_parameters() == full.num_parameters() == copy.deepcopy(model).num_parameters()
    trained = model.get_parameter("proj_out.weight").requires_grad_(True)
    model.get_parameter("proj_out.bias").requires_grad_(False)
    others = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and not name.startswith("proj_out"))
    assert model.num_parameters(only_trainable=True) == trained.numel() + others


def test_half_precision_spares_what_is_listed_as_float32(folder: Path) -> None:
    model = WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.float16)
    kept = WanTransformer3DModel._keep_in_fp32_modules
    assert kept is not None and len(set(kept)) == len(kept)
    stored = model.state_dict()
    assert any(name.endswith("weight_scale") for name in stored)
    for name, tensor in stored.items():
        if tensor.is_floating_point():
            assert tensor.dtype is (torch.float32 if set(name.split(".")) & set(kept) else torch.float16), name
