"""A packed file is as small as its bits say: counted in the file that users download, tensor by tensor."""

from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qvgen.checkpoint.packed import export_pipeline
from qvgen.checkpoint.pipeline import load_transformer
from qvgen.models.registry import load_family
from qvgen.nn.packed_linear import packed_layers
from qvgen.nn.swap import convert_, prepare_
from qvgen.quant.scheme import QuantArgs, QuantScheme

pytestmark = pytest.mark.integration

BYTES = {"I64": 8, "I32": 4, "F32": 4, "BF16": 2}
SOURCE = Path(__file__).parents[2] / "assets/tiny-wan"
GROUPS = 4  # of timesteps
# Per output: scale, zero point, row sum. Per timestep group: two clips. And the shape.
PER_OUTPUT, PER_TIMESTEP_GROUP, SHAPE = 3 * 4, 2 * 4, 2 * 8


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_per_weight(bits: int, tmp_path: Path) -> None:
    scheme = QuantScheme(weights=QuantArgs(num_bits=bits, zero_point_domain="float"), timestep_groups=GROUPS)
    transformer = load_transformer(SOURCE)
    prepare_(transformer, scheme, default_targets=load_family(SOURCE).default_targets)
    convert_(transformer)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in packed_layers(transformer)}
    export_pipeline(SOURCE, transformer, scheme, tmp_path / "packed", torch.bfloat16)

    with safe_open(tmp_path / "packed/transformer/diffusion_pytorch_model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
        stored = {name: prod(s.get_shape()) * BYTES[s.get_dtype()] for name, s in slices.items()}
    assert shapes
    for name, (n, k) in shapes.items():
        assert k % 32 == 0  # otherwise a row would be padded to whole 32-bit words
        own = {key.removeprefix(f"{name}."): size for key, size in stored.items() if key.startswith(f"{name}.")}
        assert 8 * own.pop("weight_packed") == bits * n * k
        own.pop("bias", None)
        assert sum(own.values()) <= n * PER_OUTPUT + GROUPS * PER_TIMESTEP_GROUP + SHAPE
