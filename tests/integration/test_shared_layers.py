"""A linear layer that stands in two places of a model is one layer: quantized, trained, packed, stored and loaded as such."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file
from torch import nn

import qvgen.integrations.diffusers
from qvgen.checkpoint.packed import export_pipeline
from qvgen.checkpoint.training import load_training_state, save_training_state
from qvgen.nn.packed_linear import PackedLinear, packed_layers
from qvgen.nn.qat_linear import QATLinear
from qvgen.nn.swap import convert_, prepare_, qat_layers
from qvgen.nn.targets import match_linears
from qvgen.quant.scheme import QuantArgs, QuantScheme
from qvgen.tensors import save_tensors

pytestmark = pytest.mark.integration
assert qvgen.integrations.diffusers  # registers the quantizer

SCHEME = QuantScheme(
    weights=QuantArgs(num_bits=8), input_activations=QuantArgs(num_bits=8, strategy="token"), timestep_groups=1
)
NAMES = ["blocks.0.q", "blocks.0.k", "blocks.1.q", "head"]  # blocks.1.k is blocks.0.k, and last is head


class Sharing(ModelMixin, ConfigMixin):
    """Two blocks with one key projection, and a head under two names."""

    @register_to_config
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        key = nn.Linear(width, width)
        self.blocks = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(width, width), "k": key}) for _ in range(2)])
        self.head = nn.Linear(width, width)
        self.last = self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks: Any = self.blocks
        for block in blocks:
            x = x + block["q"](x) * block["k"](x)
        return self.last(self.head(x))


def model() -> Any:
    torch.manual_seed(0)
    return Sharing().eval()


def x() -> torch.Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


def check_shared(of: Any, kind: type[nn.Module]) -> None:
    assert of.blocks[0]["k"] is of.blocks[1]["k"] and of.head is of.last
    assert all(isinstance(of.get_submodule(name), kind) for name in (*NAMES, "blocks.1.k", "last"))


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        ([], [], NAMES),
        (["blocks.1.k"], [], ["blocks.0.k"]),
        (["last", "head"], [], ["head"]),
        ([], ["last"], NAMES[:3]),
        ([r"re:blocks\.1"], [], ["blocks.0.k", "blocks.1.q"]),
        ([r"re:blocks"], [r"re:blocks\.1\."], ["blocks.0.q"]),
    ],
)
def test_any_of_its_names_selects_a_layer_and_any_ignores_it(
    targets: list[str], ignore: list[str], expected: list[str]
) -> None:
    assert match_linears(model(), targets, ignore) == expected


def test_both_places_share_one_layer_after_each_step() -> None:
    student, teacher = model(), model()
    assert prepare_(student, SCHEME) == NAMES == [name for name, _ in qat_layers(student)]
    check_shared(student, QATLinear)
    student(x()).sum().backward()
    assert student.blocks[1]["k"].weight.grad is not None
    expected = student(x()).detach()
    assert convert_(student) == NAMES == [name for name, _ in packed_layers(student)]
    check_shared(student, PackedLinear)
    torch.testing.assert_close(student(x()), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(student(x()), teacher(x()), rtol=0.1, atol=0.1)
    check_shared(copy.deepcopy(student), PackedLinear)


def test_a_training_state_comes_back(tmp_path: Path) -> None:
    student = model()
    prepare_(student, SCHEME)
    optimizer = torch.optim.AdamW(student.parameters())
    student(x()).sum().backward()
    optimizer.step()
    average = {name: p.detach().clone() for name, p in student.named_parameters()}
    save_training_state(tmp_path / "state.safetensors", student, optimizer, average, 1)
    again = model()
    prepare_(again, SCHEME)
    other = torch.optim.AdamW(again.parameters())
    assert load_training_state(tmp_path / "state.safetensors", again, other, {n: t.clone() for n, t in average.items()}) == 1
    check_shared(again, QATLinear)
    assert torch.equal(again(x()), student(x()))


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Any, Path]:
    source = tmp_path / "source"
    model().save_config(source / "transformer")
    (source / "model_index.json").write_text(json.dumps({"_class_name": "SharingPipeline"}))
    packed = model()
    prepare_(packed, SCHEME)
    convert_(packed)
    export_pipeline(source, packed, SCHEME, tmp_path / "packed", torch.bfloat16)
    return packed, tmp_path / "packed/transformer"


def test_it_is_stored_under_both_names_and_counted_once(exported: tuple[Any, Path]) -> None:
    packed, folder = exported
    config = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert config["num_targets"] == len(NAMES) and config["targets"] == NAMES
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == packed.state_dict().keys()
    for leaf in ("weight_packed", "weight_scale", "weight_zero_point", "bias"):
        assert torch.equal(stored[f"blocks.0.k.{leaf}"], stored[f"blocks.1.k.{leaf}"]), leaf
    assert {t.dtype for n, t in stored.items() if n.endswith("weight_scale")} == {torch.float32}, "both names are exact"


def test_it_loads_as_one_layer_and_saves_again(exported: tuple[Any, Path], tmp_path: Path) -> None:
    packed, folder = exported
    loaded: Any = Sharing.from_pretrained(folder)
    check_shared(loaded, PackedLinear)
    with torch.no_grad():
        for layer in (packed.blocks[0]["q"], packed.blocks[0]["k"], packed.blocks[1]["q"], packed.head):
            layer.bias.copy_(layer.bias.bfloat16())  # as it is stored
    assert torch.equal(loaded(x()), packed(x()))
    loaded.save_pretrained(tmp_path / "again")
    again = Sharing.from_pretrained(tmp_path / "again")
    check_shared(again, PackedLinear)
    assert torch.equal(again(x()), loaded(x()))


def test_tensors_that_share_memory_are_stored_apart(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    save_tensors(tmp_path / "t.safetensors", {"a": whole, "b": whole, "c": whole[2:4], "d": whole.view(2, 3).T})
    stored = load_file(tmp_path / "t.safetensors")
    assert torch.equal(stored["b"], whole) and torch.equal(stored["c"], whole[2:4])
    assert torch.equal(stored["d"], whole.view(2, 3).T)
