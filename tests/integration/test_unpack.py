"""The way back out: an unpacked model is the packed one with its activation quantization switched off."""

import copy
import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipelines.cli.everyday import main
from qvgen.checkpoint.packed import export_pipeline, load_packed_transformer
from qvgen.checkpoint.pipeline import load_pipeline, load_transformer
from qvgen.checkpoint.unpack import unpack_folder
from qvgen.models.registry import load_family
from qvgen.models.tiny import tiny_pipeline
from qvgen.nn.packed_linear import PackedLinear, packed_layers
from qvgen.nn.swap import convert_, prepare_
from qvgen.nn.targets import match_linears
from qvgen.packing import layout
from qvgen.quant.grid import LayerGrid
from qvgen.quant.scheme import QuantArgs, QuantScheme
from tests.support.packed_model import predict

pytestmark = pytest.mark.integration

# What the methods export: svdquant scales inputs and has a branch, viditq scales and rotates; all others export plain layers
# (qvgen+ folds its shifts and scales into the model around them).
SCHEMES = {
    "plain": {},
    "grouped": {"weights": QuantArgs(num_bits=3, strategy="group", group_size=4)},
    "symmetric": {"weights": QuantArgs(num_bits=8, symmetric=True)},
    "svdquant": {"input_scaling": True, "low_rank": 2},
    "viditq": {"input_scaling": True, "input_rotation": 4},
    "all": {"input_scaling": True, "input_rotation": 2, "low_rank": 1},
}
CASES = [(family, scheme) for scheme in SCHEMES for family in ("wan", "cogvideox")]
# Outputs near 1, layer by layer in another order of operations.
ROUNDING = 2e-5


def random_grid(weight: torch.Tensor, scheme: QuantScheme, generator: torch.Generator) -> LayerGrid:
    """Every extra of the scheme with values that matter."""
    (n, k), rank = weight.shape, scheme.rank_of(*weight.shape)
    extras = {
        "input_scale": torch.rand(k, generator=generator) * 3 + 0.2 if scheme.input_scaling else None,
        "low_rank_up": torch.randn(n, rank, generator=generator) / 8 if rank else None,
        "low_rank_down": torch.randn(rank, k, generator=generator) / 8 if rank else None,
    }
    whole = LayerGrid(None, None, None, None, **extras)  # type: ignore[arg-type]
    plain = scheme.model_copy(update={"input_rotation": None})  # of the residual, which is rotated already
    own = vars(LayerGrid.min_max(whole.residual(weight, scheme), plain)) | extras
    return LayerGrid(**own)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A packed folder, its family and scheme."""
    name, kind = request.param
    root = tmp_path_factory.mktemp("unpack")
    source, scheme = tiny_pipeline(name, root / "source"), QuantScheme(timestep_groups=2, **SCHEMES[kind])  # type: ignore[arg-type]
    family, model = load_family(source), load_transformer(source)
    generator = torch.Generator().manual_seed(0)
    names = match_linears(model, (), (), family.default_targets)
    grids = {layer: random_grid(model.get_submodule(layer).weight, scheme, generator) for layer in names}
    prepare_(model, scheme, default_targets=family.default_targets, grids=grids)
    convert_(model)
    export_pipeline(source, model, scheme, root / "packed", torch.float32)
    return root / "packed", family, scheme


def without_activation_quantization_(model: Any) -> Any:
    """The same packed layers, as weight-only ones."""
    for _, layer in packed_layers(model):
        layer.scheme = layer.scheme.model_copy(update={"input_activations": None})
        layer._buffers[layout.CLIP_LOWER] = layer._buffers[layout.CLIP_UPPER] = None
    return model


def test_outputs_are_the_packed_models_without_activation_quantization(packed: Any, tmp_path: Path) -> None:
    folder, family, scheme = packed
    quantized = load_packed_transformer(folder)
    exact = {name: layer.dequantize() for name, layer in packed_layers(quantized)}
    expected = predict(family, without_activation_quantization_(copy.deepcopy(quantized)))
    assert float((predict(family, quantized) - expected).abs().max()) > 100 * ROUNDING  # activations were quantized

    assert unpack_folder(folder, tmp_path / "plain", torch.float32) == len(exact)
    plain = load_pipeline(tmp_path / "plain").transformer
    assert not list(packed_layers(plain)) and "quantization_config" not in plain.config
    assert float((predict(family, plain) - expected).abs().max()) < ROUNDING
    if not scheme.extras:
        weights = load_file(tmp_path / "plain/transformer/diffusion_pytorch_model.safetensors")
        assert all(torch.equal(weights[f"{name}.weight"], weight) for name, weight in exact.items())

    assert quantized.dequantize() is quantized
    assert quantized.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in quantized.state_dict().items())
    assert torch.equal(predict(family, quantized), predict(family, plain))
    quantized.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())


@pytest.fixture(scope="module")
def plain_case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("one")
    source, scheme = tiny_pipeline("wan", root / "source"), QuantScheme()
    model = load_transformer(source)
    prepare_(model, scheme, default_targets=load_family(source).default_targets)
    convert_(model)
    export_pipeline(source, model, scheme, root / "packed", torch.float32)
    return root / "packed"


def test_the_command(
    plain_case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plain"
    monkeypatch.setattr(sys, "argv", ["qvgen", "unpack", str(plain_case), "--out", str(out), "--dtype", "bf16"])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code and "20 layers unpacked to bfloat16" in capsys.readouterr().out
    weights = load_file(out / "transformer/diffusion_pytorch_model.safetensors")
    exact = dict(packed_layers(load_packed_transformer(plain_case)))
    assert all(torch.equal(weights[f"{name}.weight"], layer.dequantize().bfloat16()) for name, layer in exact.items())
    modes = {stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*") if path.is_file()}
    assert modes == {stat.S_IMODE((out / "README.md").stat().st_mode)}
    assert (out / "vae/config.json").read_bytes() == (plain_case / "vae/config.json").read_bytes()
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 1 and "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_a_weight_that_the_dtype_cannot_hold_is_named(plain_case: Path, tmp_path: Path) -> None:
    model = load_packed_transformer(plain_case, torch.float16)
    layer = model.get_submodule("blocks.1.attn2.to_v")
    assert isinstance(layer, PackedLinear)
    layer.weight_scale.mul_(1e6)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn2\.to_v: its weight reaches .* more than torch\.float16 holds"):
        model.dequantize()
    with pytest.raises(ValueError, match="is not packed"):
        unpack_folder(plain_case.parent / "source", tmp_path / "out", torch.bfloat16)
    assert not list(tmp_path.iterdir())


def test_an_adapter_beside_a_packed_layer_is_named(plain_case: Path) -> None:
    from peft import LoraConfig

    model = load_packed_transformer(plain_case)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"^blocks\.0\.attn1\.to_q: an adapter is loaded"):
        model.dequantize()
    assert len(list(packed_layers(model))) == 20
