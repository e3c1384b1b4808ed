"""Every pipeline that diffusers denoises with a transformer is rounded, saved, loaded, sampled, offloaded, adapted, unpacked:
through the generic adapter, which asks no family."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

import qvgen.integrations.diffusers  # noqa: F401  (plain diffusers loads what is packed)
from pipelines.cli.everyday import main
from qvgen.checkpoint.packed import verify_folder
from qvgen.checkpoint.rounded import pack_pipeline
from qvgen.checkpoint.unpack import unpack_folder
from qvgen.models.generic import block_linears
from qvgen.nn.packed_linear import packed_layers
from qvgen.quant.scheme import QuantArgs, QuantScheme
from tests.support.any_pipelines import KINDS, latents, load, make

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SCHEME = QuantScheme(
    weights=QuantArgs(num_bits=8), input_activations=QuantArgs(num_bits=8, strategy="token"), timestep_groups=1
)
CLOSE = 0.1  # relative distance of latents after two steps with random weights; 8 bits of both
ROUNDING = 1e-3


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def denoisers(pipeline: Any) -> list[Any]:
    parts = (getattr(pipeline, name, None) for name in ("transformer", "transformer_2"))
    return [part for part in parts if part is not None]


@pytest.fixture(scope="module", params=list(KINDS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp(request.param)
    pipeline, call = make(request.param)
    pipeline.save_pretrained(root / "full")
    layers = [len(block_linears(part)) for part in denoisers(pipeline)]
    found = pack_pipeline(root / "full", root / "packed", SCHEME, torch.float32)
    assert list(found.values()) == layers
    return SimpleNamespace(kind=request.param, root=root, call=call, layers=layers, full=latents(pipeline, call))


def test_it_loads_and_makes_what_full_precision_makes(case: SimpleNamespace) -> None:
    packed = load(case.root / "packed")
    assert [len(list(packed_layers(part))) for part in denoisers(packed)] == case.layers
    assert verify_folder(case.root / "packed") == sum(case.layers)
    made = latents(packed, case.call)
    assert 0 < distance(made, case.full) < CLOSE
    assert torch.equal(latents(packed, case.call), made)
    for part in denoisers(packed):
        cpu = torch.device("cpu")
        part.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert distance(latents(packed, case.call), made) < ROUNDING


def test_adapters_read_beside_the_packed_layers(case: SimpleNamespace) -> None:
    packed = load(case.root / "packed")
    if not hasattr(packed.transformer, "add_adapter"):
        pytest.skip(f"diffusers gives {type(packed.transformer).__name__} no adapters")
    made = latents(packed, case.call)
    for part in denoisers(packed):
        part.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        assert any(isinstance(module, LoraLayer) for module in part.modules())
    assert distance(latents(packed, case.call), made) > ROUNDING
    for part in denoisers(packed):
        part.delete_adapters("default")
    assert distance(latents(packed, case.call), made) < ROUNDING


def test_it_comes_back_out(case: SimpleNamespace, tmp_path: Path) -> None:
    assert unpack_folder(case.root / "packed", tmp_path / "plain", torch.float32) == sum(case.layers)
    plain = load(tmp_path / "plain")
    assert not any(list(packed_layers(part)) for part in denoisers(plain))
    assert 0 < distance(latents(plain, case.call), case.full) < CLOSE


@pytest.fixture
def unknown(tmp_path: Path) -> Path:
    """A pipeline class that no family has."""
    diffusers.QwenImageImg2ImgPipeline(**make("qwen_image")[0].components).save_pretrained(tmp_path / "full")
    return tmp_path / "full"


def test_the_command(unknown: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = unknown.parent / "packed"

    def run(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", ["qvgen", "pack", str(unknown), "--out", str(out), *more])
        with pytest.raises(SystemExit) as done:
            main()
        return int(done.value.code or 0)

    assert run("--activation-bits", "12") == 1 and "must be 2 to 8, or 16" in capsys.readouterr().err
    assert run("--group-size", "8") == 0 and "28 packed layers in transformer" in capsys.readouterr().out
    group = json.loads((out / "transformer/config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert (group["weights"]["num_bits"], group["weights"]["group_size"], group["input_activations"]["num_bits"]) == (4, 8, 8)
    assert "pipeline_tag" not in (out / "README.md").read_text().split("---")[1]
    assert run() == 1 and "is there already" in capsys.readouterr().err


def test_what_cannot_be_packed_is_refused(unknown: Path, tmp_path: Path) -> None:
    def refused(said: str) -> None:
        with pytest.raises(ValueError, match=said):
            pack_pipeline(unknown, tmp_path / "out", SCHEME, torch.float32)
        assert [path.name for path in tmp_path.iterdir()] == ["full"]

    index = unknown / "model_index.json"
    given = json.loads(index.read_text())
    index.write_text(json.dumps(given | {"transformer": ["somebody", "QwenImageTransformer2DModel"]}))
    refused("component transformer is code of 'somebody'")
    index.write_text(json.dumps({name: value for name, value in given.items() if name != "transformer"}))
    refused("has no component transformer or transformer_2")
    index.write_text(json.dumps(given))
    config = unknown / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    refused("is quantized already")
    with pytest.raises(ValueError, match="Linear has no linear layers in blocks"):
        block_linears(torch.nn.Linear(2, 2))
