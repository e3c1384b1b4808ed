"""What diffusers can do with any transformer, done with a packed one."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, dispatch_model, infer_auto_device_map
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import compute_module_sizes
from diffusers import WanTransformer3DModel
from torch import nn

from qvgen.checkpoint.packed import export_pipeline, load_packed_transformer, verify_folder
from qvgen.checkpoint.pipeline import load_transformer
from qvgen.models.registry import load_family
from qvgen.models.tiny import tiny_pipeline
from qvgen.nn.layers_together import is_spread
from qvgen.nn.packed_linear import PackedLinear, packed_layers
from qvgen.nn.swap import convert_, prepare_
from qvgen.packing.layout import EXACT_NAMES
from qvgen.quant.scheme import QuantScheme

pytestmark = pytest.mark.integration

SCHEME = QuantScheme(timestep_groups=4)
# Tensors at other addresses: PyTorch's own products round by them.
ROUNDING = 1e-3
# What moves a few codes at ties: float32 sums in another order on a GPU, biases in 16 bits.
OTHER_DEVICE = 2e-2
NO_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: `make gpu` runs this on one")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_CARD)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed pipeline in a folder with a name that a shell, a URL and an ASCII table would trip over."""
    return make(tmp_path_factory.mktemp("features") / "it's a dir; ünïcode & 100% #1", "wan")


@pytest.fixture(scope="module", params=["wan", "cogvideox", "cogvideox rotary"])
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed pipeline of each family, as often as its blocks differ."""
    family, *options = request.param.split()
    return make(tmp_path_factory.mktemp("each"), family, **dict.fromkeys(options, True))


def make(root: Path, family_name: str, **options: bool) -> Path:
    source = tiny_pipeline(family_name, root / "source", **options)
    family, model = load_family(source), load_transformer(source)
    prepare_(model, SCHEME, default_targets=family.default_targets)
    convert_(model)
    export_pipeline(source, model, SCHEME, root / "packed", torch.float32)
    return root / "packed"


@torch.no_grad()
def predict(folder: Path, model: Any, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    family = load_family(folder)
    shape = (2, 3, 4, 4, 4) if family.name == "cogvideox" else (2, 4, 3, 4, 4)
    latents, text = torch.randn(shape, generator=generator), torch.randn(2, 8, 16, generator=generator)
    timestep = torch.tensor([30.0, 900.0], device=device)
    latents, text = (tensor.to(device, model.dtype) for tensor in (latents, text))
    return family.predict(model, latents, timestep, text).float().cpu()


def blocks_of(model: Any) -> nn.ModuleList:
    return model.blocks if hasattr(model, "blocks") else model.transformer_blocks


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


def test_layerwise_casting_in_16_bits_stores_biases_so(folder: Path) -> None:
    model, apart = load_packed_transformer(folder), load_packed_transformer(folder)
    expected, before = predict(folder, model), {name: tensor.clone() for name, tensor in exact(model).items()}
    names = [name for name, layer in packed_layers(model) if layer.bias is not None]
    skipped = next(name for name in names if "ffn" in name)
    model.enable_layerwise_casting(torch.float16, torch.float32, skip_modules_pattern=("^" + re.escape(skipped) + "$",))
    found = {name: model.get_submodule(name).bias.dtype for name in names}
    assert found == {name: torch.float32 if name == skipped else torch.float16 for name in names}
    assert same(exact(model), before) and model.dtype == torch.float32
    torch.testing.assert_close(predict(folder, model), expected, rtol=0, atol=OTHER_DEVICE * float(expected.abs().max()))
    apart.enable_layerwise_casting(torch.float16, torch.float32, skip_modules_classes=(PackedLinear,))
    assert torch.equal(predict(folder, apart), expected)


def loaded(folder: Path, called: bool) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
    """A model, what it predicts and its packed tensors; `called`: a backend has its weights already."""
    model, other = load_packed_transformer(folder), load_packed_transformer(folder)
    expected = predict(folder, model)
    return (model if called else other), expected, {name: tensor.clone() for name, tensor in exact(other).items()}


CALLED = pytest.mark.parametrize("called", [False, True], ids=["new", "called before"])


@DEVICES
@CALLED
@pytest.mark.parametrize("how", ["leaf_level", "block_level", "leaf_level, stream", "block_level, stream"])
def test_group_offload(each: Path, how: str, called: bool, device: str) -> None:
    kind, _, stream = how.partition(", ")
    if stream and device == "cpu":
        pytest.skip("streams are a GPU's")
    model, expected, before = loaded(each, called)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(
        onload_device=torch.device(device),
        offload_device=torch.device("cpu"),
        offload_type=kind,
        use_stream=bool(stream),
        **blocks,
    )
    for _ in range(2):
        assert relative(predict(each, model, device), expected) < OTHER_DEVICE
    assert same(exact(model), before)


@CALLED
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload_to_disk(each: Path, tmp_path: Path, kind: str, called: bool) -> None:
    """Between calls the tensors hold nothing: whoever reads them without calling their module is found out, without a GPU."""
    model, expected, _ = loaded(each, called)
    cpu, blocks = torch.device("cpu"), {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type=kind, offload_to_disk_path=str(tmp_path), **blocks
    )
    for tensor in [*blocks_of(model).parameters(), *blocks_of(model).buffers()]:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 0)
    assert relative(predict(each, model), expected) < ROUNDING


@DEVICES
@CALLED
@pytest.mark.parametrize("buffers", [False, True], ids=["parameters", "buffers too"])
def test_sequential_offload(each: Path, buffers: bool, called: bool, device: str) -> None:
    """What enable_sequential_cpu_offload does to a transformer: its tensors are on meta between calls."""
    model, expected, before = loaded(each, called)
    cpu_offload(model, torch.device(device), offload_buffers=buffers)
    for _ in range(2):
        assert relative(predict(each, model, device), expected) < OTHER_DEVICE
    remove_hook_from_module(model, recurse=True)
    assert same(exact(model), before)
    assert relative(predict(each, model), expected) < ROUNDING


@DEVICES
@CALLED
def test_model_offload(folder: Path, called: bool, device: str) -> None:
    """What enable_model_cpu_offload does to a transformer."""
    model, expected, before = loaded(folder, called)
    model, hook = cpu_offload_with_hook(model, torch.device(device))
    for _ in range(2):
        assert relative(predict(folder, model, device), expected) < OTHER_DEVICE
        hook.offload()
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert same(exact(model), before)


@DEVICES
@pytest.mark.parametrize("where", ["one device", "auto", "balanced"])
def test_device_map(folder: Path, where: str, device: str) -> None:
    expected = predict(folder, load_packed_transformer(folder))
    mapped = device if where == "one device" else where
    model = WanTransformer3DModel.from_pretrained(folder / "transformer", device_map=mapped, use_safetensors=True)
    place = device if where == "one device" or device == "cuda" else "cpu"
    assert relative(predict(folder, model, place), expected) < OTHER_DEVICE


def test_spread_over_devices(each: Path) -> None:
    """What device_map does on several GPUs, with accelerate's hooks on one: blocks stay fused where they lie in one piece."""
    expected, model = predict(each, load_packed_transformer(each)), load_packed_transformer(each)
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert all(hasattr(layer, "_hf_hook") for _, layer in packed_layers(model))
    called: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        block: Any = blocks_of(model)[0]
        patch.setattr(type(block), "forward", lambda *_: called.append("diffusers' own"))
        assert torch.equal(predict(each, model), expected) and not called
        assert not is_spread(block)
        norm = block.norm2 if isinstance(block.norm2, nn.LayerNorm) else block.norm2.norm
        norm.weight = nn.Parameter(norm.weight.to("meta"))  # stands for another device
        assert is_spread(block)
        block(*[torch.zeros(1)] * 4)
        assert called == ["diffusers' own"]


def test_a_device_map_counts_packed_bytes(folder: Path) -> None:
    model = load_packed_transformer(folder)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in model.blocks.state_dict().values())
    assert compute_module_sizes(model)["blocks"] == stored
    full = compute_module_sizes(load_transformer(folder.parent / "source"))["blocks"]
    assert stored < 0.4 * full
    room = {"cpu": compute_module_sizes(model)[""] - 1}  # a byte too few, and the last parts have to lie elsewhere
    planned = infer_auto_device_map(model, room, no_split_module_classes=model._no_split_modules)
    assert planned["blocks.0"] == "cpu" and "disk" in planned.values()


@DEVICES
def test_to_a_device_and_back_twice(folder: Path, device: str) -> None:
    model, expected, before = loaded(folder, called=True)
    for _ in range(2):
        assert relative(predict(folder, model.to(device), device), expected) < OTHER_DEVICE
        assert {tensor.device.type for tensor in model.state_dict().values()} == {device}
        assert torch.equal(predict(folder, model.to("cpu")), expected)
    assert same(exact(model), before)


@DEVICES
def test_two_models_in_one_process(folder: Path, device: str) -> None:
    """In turn, block by block as it were: neither takes the other's weights or timestep."""
    models = [load_packed_transformer(folder) for _ in range(2)]
    with torch.no_grad():
        for _, layer in packed_layers(models[1]):
            layer.weight_scale.mul_(0.5)
    expected = [predict(folder, model) for model in models]
    assert relative(*expected) > 0.01
    for model in models:
        model.to(device)
    for _ in range(2):
        for model, one in zip(models, expected, strict=True):
            assert relative(predict(folder, model, device), one) < OTHER_DEVICE


def test_models_on_several_gpus(folder: Path) -> None:
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"{count} GPUs here: this needs two")
    expected = predict(folder, load_packed_transformer(folder))
    for i in (1, 0, 1):  # 1 is not the current device
        model: Any = load_packed_transformer(folder).to(f"cuda:{i}")
        assert relative(predict(folder, model, f"cuda:{i}"), expected) < OTHER_DEVICE
    model = WanTransformer3DModel.from_pretrained(folder / "transformer", device_map="balanced", use_safetensors=True)
    assert relative(predict(folder, model, "cuda:0"), expected) < OTHER_DEVICE


def test_another_attention_backend(each: Path) -> None:
    model = load_packed_transformer(each)
    expected = predict(each, model)
    model.set_attention_backend("native")
    assert relative(predict(each, model), expected) < ROUNDING


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
