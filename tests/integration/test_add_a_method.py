"""docs/add-a-method.md, followed: its card becomes a module, is registered, calibrated, trained for two steps and packed."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from qvgen.data.latents import save_text
from qvgen.methods.method import Method
from qvgen.methods.registry import METHODS
from qvgen.models.tiny import tiny_pipeline
from qvgen.nn.packed_linear import PackedLinear
from qvgen.nn.swap import convert_, qat_layers
from qvgen.params import ParamsError, validate_params
from qvgen.training import Sources, build_trainer, calibrate, finish

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.integration


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Method:
    """The page's example as a module of its own."""
    page = (ROOT / "docs/add-a-method.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "halves.py").write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("halves", tmp_path / "halves.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "halves", module)
    spec.loader.exec_module(module)
    return module.METHOD


def data_of(model: Path, folder: Path) -> Path:
    """Prepared data of random latents and texts, as stage prepare leaves them."""
    generator = torch.Generator().manual_seed(0)
    width = json.loads((model / "transformer/config.json").read_text())["text_dim"]
    for part in ("train", "calibration"):
        (folder / part).mkdir(parents=True)
        shard = {"latents": torch.randn(8, 4, 3, 4, 4, generator=generator), "caption_index": torch.arange(8) % 2}
        save_file(shard, folder / part / "shard-00000.safetensors")
    (folder / "captions.json").write_text(json.dumps(["one", "two"]))
    save_text(folder / "text/shard-00000.safetensors", torch.randn(3, 6, width, generator=generator).unbind())
    return folder


def tree() -> dict[str, Any]:
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    tree["method"] = "halves"
    tree["scheme"]["timestep_groups"] = 2
    tree["calibrate"] |= {"tokens_per_group": 64, "weight_candidates": 10}
    tree["qat"] |= {"steps": 2, "batch_size": 2}
    tree["decay"] |= {"initial_rank": 0, "final_steps": 0}
    return tree


def test_the_page_is_true(card: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParamsError, match="unknown method"):
        validate_params(tree(), "test")
    monkeypatch.setitem(METHODS, card.name, card)
    params = validate_params(tree(), "test")
    model = tiny_pipeline("wan", tmp_path / "model")
    sources = Sources(model, tmp_path / "calibration", data_of(model, tmp_path / "data"))
    calibrate(params, sources)
    trainer, losses = build_trainer(params, sources), []
    start = {name: layer.weight_quantizer.zero_point.detach().clone() for name, layer in qat_layers(trainer.student)}
    trainer.run(params.schedule.total_steps, lambda _, record: losses.append(record.loss))
    student = finish(trainer, params, sources)
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    assert all(torch.equal(layer.weight_quantizer.zero_point, start[name]) for name, layer in qat_layers(student))
    names = convert_(student)
    assert names and all(isinstance(student.get_submodule(name), PackedLinear) for name in names)


def test_the_loss_of_the_page_by_hand(card: Method) -> None:
    student, teacher, target = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 4.0]])
    # (1 + 0) / 2 towards the teacher, (0 + 4) / 2 towards the data.
    assert card.loss(student, lambda: teacher, target, torch.zeros(1)).item() == pytest.approx((0.5 + 2.0) / 2)
