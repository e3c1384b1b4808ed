"""Full-precision folders put together from a single file of a transformer, or with LoRA files fused, and packed from there."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.cli.everyday import main
from qvgen.checkpoint.assembled import fuse_adapters, import_single_file, parse_adapter
from qvgen.checkpoint.loadable import check_loadable
from qvgen.checkpoint.packed import verify_folder
from qvgen.checkpoint.pipeline import load_pipeline, load_transformer
from qvgen.models.source import read_pipeline
from qvgen.models.tiny import tiny_pipeline
from qvgen.nn.packed_linear import packed_layers

# Wan's own names, as its authors publish them; diffusers turns them into its own. In this order: norm2 and norm3 swap.
ORIGINAL = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    ".to_out.0.": ".o.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm__placeholder",
    "norm3": "norm2",
    "norm__placeholder": "norm3",
    "proj_out": "head.head",
}
NAMES = {"scale_shift_table": "head.modulation"}


def original(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    for ours, theirs in ORIGINAL.items():
        name = name.replace(ours, theirs)
    return name.replace("scale_shift_table", "modulation")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_pipeline("wan", tmp_path_factory.mktemp("base") / "wan")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# Tiny Wan\n")
    return folder


@pytest.fixture(scope="module")
def another(base: Path) -> dict[str, torch.Tensor]:
    """Tensors of another transformer of the base's sizes."""
    generator = torch.Generator().manual_seed(1)
    state = load_transformer(base).state_dict()
    return {name: tensor + torch.randn(tensor.shape, generator=generator) / 50 for name, tensor in state.items()}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["qvgen", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    return int(done.value.code or 0)


@pytest.mark.parametrize("layout", ["wan", "wan with a prefix", "diffusers"])
def test_a_single_file_is_the_source_of_fetch(
    base: Path, another: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    prefix = "model.diffusion_model." if "prefix" in layout else ""
    named = {name if layout == "diffusers" else prefix + original(name): t.bfloat16() for name, t in another.items()}
    assert (f"{prefix}blocks.0.self_attn.q.weight" in named) is (layout != "diffusers")
    save_file(named, tmp_path / "wan.safetensors")
    out = tmp_path / "out"
    given = ["--format", "diffusers-single-file", "--base", base, "--checkpoint", tmp_path / "wan.safetensors"]
    assert run(monkeypatch, "import", *given, "--out", out) == 0
    check_loadable(read_pipeline(out))  # as stage fetch does
    found = load_file(out / "transformer/diffusion_pytorch_model.safetensors")
    assert found.keys() == another.keys()
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in another.items())
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0") and "wan.safetensors (sha256 " in card
    assert (out / "vae/config.json").read_bytes() == (base / "vae/config.json").read_bytes()


def test_single_files_that_do_not_fit_are_refused(base: Path, another: dict[str, torch.Tensor], tmp_path: Path) -> None:
    def refused(change: dict[str, torch.Tensor | None], said: str, folder: Path = base) -> None:
        tensors = {original(k): v for k, v in (another | change).items() if v is not None}
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=said):
            import_single_file(folder, tmp_path / "x.safetensors", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["x.safetensors"]
        assert not (tmp_path / "out").exists()

    refused({"proj_out.bias": None}, r"lacks 1 tensors \(proj_out\.bias\)")
    refused({"blocks.7.x": torch.zeros(2)}, r"has 1 tensors \(blocks\.7\.x\), which this model has no place for")
    refused({"proj_out.bias": torch.zeros(3)}, r"proj_out\.bias is \[3\], the model's \[16\]")
    refused({"proj_out.bias": torch.zeros(16).to(torch.float8_e4m3fn)}, "head.head.bias is F8_E4M3, so the file is quantized")
    other = tiny_pipeline("cogvideox", tmp_path / "cogvideox")
    refused({}, "diffusers has no reader of single files for CogVideoXTransformer3DModel", other)
    with pytest.raises(ValueError, match="only safetensors files are read"):
        import_single_file(base, tmp_path / "x.ckpt", tmp_path / "out")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two LoRA files, as pipelines save them, and their products by layer."""
    folder, made = tmp_path_factory.mktemp("adapters"), {}
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        state, products = {}, {}
        for layer in ("blocks.0.attn1.to_q", "blocks.1.ffn.net.2"):
            n, k = load_transformer(base).get_submodule(layer).weight.shape
            up, down = torch.randn(n, 2, generator=generator), torch.randn(2, k, generator=generator)
            state |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
            products[layer] = up @ down
        load_pipeline(base).save_lora_weights(folder / name, transformer_lora_layers=state)
        made[name] = (folder / name / "pytorch_lora_weights.safetensors", products)
    return made


def test_adapters_are_fused_before_packing(
    base: Path, adapters: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one, products), (two, others) = adapters["one"], adapters["two"]
    given = ["--lora", f"{one}@0.5", "--lora", f"{two}@-0.25"]
    assert run(monkeypatch, "fuse", base, *given, "--out", tmp_path / "fused") == 0
    check_loadable(read_pipeline(tmp_path / "fused"))
    before = load_file(base / "transformer/diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "fused/transformer/diffusion_pytorch_model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        layer = name.removesuffix(".weight")
        expected = tensor + 0.5 * products[layer] - 0.25 * others[layer] if layer in products else tensor
        torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-6 if layer in products else 0)

    packing = ["--weight-bits", 8, "--activation-bits", 16, "--dtype", "fp32"]
    packed = tmp_path / "new" / "packed"
    assert run(monkeypatch, "pack", base, *given, *packing, "--out", packed) == 0
    assert [path.name for path in packed.parent.iterdir()] == ["packed"]
    assert verify_folder(packed) == 20
    for name, layer in packed_layers(load_pipeline(packed).transformer):
        step = after[f"{name}.weight"].amax(1, keepdim=True) - after[f"{name}.weight"].amin(1, keepdim=True)
        assert ((layer.weight - after[f"{name}.weight"]).abs() <= step / 255).all()


def test_adapters_that_do_not_fit_are_refused(base: Path, adapters: dict[str, Any], tmp_path: Path) -> None:
    def refused(state: dict[str, torch.Tensor], said: str, base: Path = base) -> None:
        save_file(state, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=said):
            fuse_adapters(base, [(tmp_path / "x.safetensors", 1.0)], tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]

    layer = "transformer.blocks.0.attn1.to_q"
    refused({f"{layer}.lora_A.weight": torch.zeros(2, 24)}, "does not fit WanTransformer3DModel")
    wrong = {f"{layer}.lora_A.weight": torch.zeros(2, 25), f"{layer}.lora_B.weight": torch.zeros(24, 2)}
    refused(wrong, "does not fit WanTransformer3DModel")
    elsewhere = {key.replace("transformer.", "text_encoder."): tensor for key, tensor in wrong.items()}
    refused(elsewhere, "WanTransformer3DModel")
    fits = {f"{layer}.lora_A.weight": torch.zeros(2, 24), f"{layer}.lora_B.weight": torch.zeros(24, 2)}
    deeper = {key.replace("blocks.0", "blocks.7"): tensor.clone() for key, tensor in fits.items()}
    refused(fits | deeper, r"also adapts 1 layers \(transformer\.blocks\.7\.attn1\.to_q\) that WanTransformer3DModel does not")
    flux = tiny_pipeline("flux", tmp_path.with_name("flux"))
    names = "transformer.x_embedder", "text_encoder.q"
    both = {key.replace(layer, name): tensor.clone() for name in names for key, tensor in fits.items()}
    refused(both, r"also adapts 1 layers \(text_encoder\.q\) .* text encoders too, which are not fused", flux)
    file = adapters["one"][0]
    with pytest.raises(ValueError, match="must be a finite number, found nan"):
        fuse_adapters(base, [(file, float("nan"))], tmp_path / "out")
    with pytest.raises(ValueError, match="'much' after the @ is no number"):
        parse_adapter(f"{file}@much")
    assert parse_adapter("a.safetensors") == (Path("a.safetensors"), 1.0)
