"""Checkpoints of the public QVGen code: the packed model computes what the public arithmetic computes."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import load_file, save_file

import qvgen.integrations.diffusers  # noqa: F401
from pipelines.cli.everyday import main
from pipelines.commands.import_model import import_public_qvgen
from qvgen.checkpoint.pipeline import load_transformer
from qvgen.checkpoint.public_qvgen import SLOTS, pack_public_, public_scheme, read_checkpoint, slots_by_timestep
from qvgen.models.tiny import tiny_pipeline
from qvgen.nn.packed_linear import packed_layers

FOLDER = Path(__file__).parents[1] / "data" / "public-qvgen-checkpoint"
CHECKPOINT = FOLDER / "diffusion_pytorch_model.safetensors"
TIMESTEPS = (999, 940, 500, 17, 0)
LAYERS = 26
BOUND = 1e-5  # of outputs near 1; found 6e-7. One code off would be a hundred times as much
LAYER = "blocks.0.attn1.to_q"
AS_TRAINED = slots_by_timestep("as-trained")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "wan"
    tiny_pipeline("wan", folder)
    return folder


def packed(base: Path, tensors: dict[str, torch.Tensor], slots: list[int] = AS_TRAINED) -> Any:
    transformer = load_transformer(base)
    names = pack_public_(transformer, tensors, public_scheme([], 4, 4, len(slots) or 1), slots)
    assert len(names) == LAYERS
    return transformer


def outputs(transformer: Any) -> dict[int, torch.Tensor]:
    given = load_file(FOLDER / "reference.safetensors")
    inputs = {name: given[name] for name in ("hidden_states", "encoder_hidden_states")}
    with torch.no_grad():
        return {t: transformer(timestep=torch.tensor([t]), return_dict=False, **inputs)[0] for t in TIMESTEPS}


def furthest(transformer: Any) -> float:
    given = load_file(FOLDER / "reference.safetensors")
    return max(float((output - given[f"output_t{t}"]).abs().max()) for t, output in outputs(transformer).items())


def test_outputs_are_those_of_the_public_arithmetic(base: Path) -> None:
    assert furthest(packed(base, read_checkpoint(CHECKPOINT))) < BOUND


def test_adapters_are_part_of_the_weight_that_is_rounded(base: Path) -> None:
    tensors = read_checkpoint(CHECKPOINT)
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(24, 3, generator=generator) / 8, torch.randn(3, 24, generator=generator) / 8
    tensors |= {f"{LAYER}.w": tensors[f"{LAYER}.w"] - up @ down}
    assert furthest(packed(base, tensors)) > 100 * BOUND
    tensors |= {f"{LAYER}.loraA.weight": down, f"{LAYER}.loraB.weight": up}
    assert furthest(packed(base, tensors)) < BOUND


def test_a_negative_scale_is_the_mirrored_grid(base: Path) -> None:
    tensors = read_checkpoint(CHECKPOINT)
    scale, zero_point = tensors[f"{LAYER}.wquantizer.scale"], tensors[f"{LAYER}.wquantizer.zero_point"]
    mirrored = tensors | {f"{LAYER}.wquantizer.scale": -scale, f"{LAYER}.wquantizer.zero_point": 15 - zero_point}
    assert furthest(packed(base, mirrored)) < BOUND


def test_clips_of_the_mean_and_of_the_script(base: Path) -> None:
    tensors = read_checkpoint(CHECKPOINT)
    logits = tensors[f"{LAYER}.aquantizer.lower"]
    layer = dict(packed_layers(packed(base, tensors, [])))[LAYER]
    torch.testing.assert_close(layer.input_clip_lower, (0.95 * logits.sigmoid()).mean().reshape(1))
    # 50 steps with guidance: slots fall by two a step and are used up half-way.
    slots = slots_by_timestep("inference-script", FlowMatchEulerDiscreteScheduler(), steps=50)
    assert len(slots) == 1000 and slots[999] == SLOTS - 1 and slots[500] == 1 and slots[470] == slots[0] == 0
    assert sorted(set(slots)) == [0, *range(1, SLOTS, 2)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks.0.norm2.weight": None}, "lacks blocks.0.norm2.weight"),
        ({f"{LAYER}.aquantizer.upper": None}, f"lacks {LAYER}.aquantizer.upper"),
        ({"blocks.7.x": torch.zeros(1)}, "has blocks.7.x, which this model has no place for"),
        ({f"{LAYER}.loraA.weight": torch.zeros(2, 24)}, f"lacks {LAYER}.loraB.weight"),
        ({f"{LAYER}.w": torch.zeros(24, 23)}, rf"{LAYER}.w is \[24, 23\], the model's \[24, 24\]"),
        ({"blocks.0.norm2.wquantizer.scale": torch.zeros(1)}, "quantizes blocks.0.norm2, which is no linear layer"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(base: Path, change: dict[str, torch.Tensor | None], said: str) -> None:
    tensors = {k: v for k, v in (read_checkpoint(CHECKPOINT) | change).items() if v is not None}
    transformer = load_transformer(base)
    before = [name for name, _ in transformer.named_modules()]
    with pytest.raises(ValueError, match=said):
        pack_public_(transformer, tensors, public_scheme([], 4, 4, 1), [])
    assert [name for name, _ in transformer.named_modules()] == before


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"no tensor \.\.\.wquantizer\.scale"):
        read_checkpoint(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="only safetensors files are read"):
        read_checkpoint(tmp_path / "x.pt")
    (tmp_path / "x.safetensors").write_bytes(CHECKPOINT.read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("base", "revision", "said"),
    [
        ("models:/qvgen@champion", None, "models of the registry are packed"),
        ("org/name@main", None, "40 hex digits"),
        (f"org/name@{'0' * 40}", "1" * 40, "names another commit than --revision"),
        (f"org/name@{'0' * 40}", None, "org/name at 00000000 could not be downloaded"),
    ],
)
def test_a_base_by_name(base: str, revision: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=said):
        import_public_qvgen(base, CHECKPOINT, tmp_path / "packed", revision=revision)


def test_the_command_writes_a_folder_that_diffusers_loads(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    given = ["--checkpoint", str(CHECKPOINT), "--base", str(base), "--out", str(out), "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["qvgen", "import", *given])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code and f"{LAYERS} packed layers, W4A4" in capsys.readouterr().out
    pipeline = WanPipeline.from_pretrained(out)
    assert len(list(packed_layers(pipeline.transformer))) == LAYERS
    assert furthest(pipeline.transformer) < BOUND
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 1 and "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
