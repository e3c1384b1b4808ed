"""Packed layers with a norm before them, a gate and a residual after them: bit for bit what the kernels give one by one."""

import copy
import os
from typing import Any

import pytest
import torch

from qvgen.integrations.fused import fuse_
from qvgen.kernels.block_ops import add_gated, layer_norm_modulate
from qvgen.kernels.fused_ops import Norm
from qvgen.kernels.registry import KernelPreference
from qvgen.kernels.triton import configurations, launch
from qvgen.models import cogvideox, wan
from qvgen.nn.layers_together import added_feed_forward, added_linear, feed_forward, normalized_linears
from qvgen.nn.packed_linear import PackedLinear, packed_layers
from qvgen.nn.swap import convert_, prepare_
from qvgen.nn.timestep import set_timestep
from qvgen.quant.scheme import QuantArgs, QuantScheme
from tests.support.packed_reference import WEIGHTS, build, inputs, scheme_of

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
STEPS = torch.tensor([10.0, 900.0])
INTEGER = scheme_of(WEIGHTS[2], 4, 4, False)
N, S, D, WIDE = 2, 3, 32, 48


@pytest.fixture(autouse=True)
def _at(monkeypatch: pytest.MonkeyPatch) -> None:
    set_timestep(STEPS.to(DEVICE))
    monkeypatch.setenv("QVGEN_KERNELS", KernelPreference.TRITON if DEVICE == "cuda" else KernelPreference.AUTO)


def prepared(scheme: QuantScheme, n: int, k: int, seed: int = 0) -> PackedLinear:
    layer = build(scheme, n, k, seed)[0].to(DEVICE)
    layer.prepare_backend(KernelPreference.TRITON)
    return layer


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Bit for bit; where products run in e4m3 a residual is added in one rounding less."""
    assert a.dtype == b.dtype and a.shape == b.shape
    if launch.architecture_of(a.device).e4m3:
        torch.testing.assert_close(a, b)
    else:
        assert torch.equal(a, b)


def modulated(rows: int) -> Norm:
    return Norm(None, None, rand(N, rows, D, seed=1), rand(N, rows, D, seed=2), 1e-6)


AFFINE = Norm(rand(D, seed=3), rand(D, seed=4), None, None, 1e-6)
CASES = [
    (INTEGER, torch.float32),
    (INTEGER, torch.bfloat16),
    (scheme_of(QuantArgs(strategy="group", group_size=16), 4, 8, True), torch.float16),
    (QuantScheme(weights=QuantArgs(), input_activations=None), torch.float32),  # not fused: one after the other
]


@torch.no_grad()
@pytest.mark.parametrize(("scheme", "dtype"), CASES, ids=["W4A4", "W4A4-bf16", "groups-fp16", "W4A16"])
def test_norm_gate_and_residual(scheme: QuantScheme, dtype: torch.dtype) -> None:
    x, wide = inputs(N, S, D).to(DEVICE, dtype), rand(N, S, WIDE, dtype=dtype)
    layers = [
        prepared(scheme, WIDE, D, seed) for seed in range(4 if dtype == torch.bfloat16 else 2)
    ]  # of which three at a time
    up, down = layers[0], prepared(scheme, D, WIDE)
    gates = None, rand(N, 1, D, seed=5), rand(N, S, D, seed=5)
    for norm, gate in zip((AFFINE, modulated(1), modulated(S)), gates, strict=True):
        normalized = layer_norm_modulate(x, *norm)
        for one, layer in zip(normalized_linears(x, norm, layers), layers, strict=True):
            assert torch.equal(one, layer(normalized))
        assert_same(added_linear(wide, down, x, gate), add_gated(x, down(wide), gate))
        expected = add_gated(x, feed_forward(normalized, up, down), gate)
        assert_same(added_feed_forward(x, norm, up, down, gate), expected)


@torch.no_grad()
@pytest.mark.parametrize("step", [3, 5])
def test_a_feed_forward_by_blocks_of_tokens(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that end within a sample, whose timesteps have other clips, and a last one that is shorter."""
    x, norm = inputs(N, S + 1, D).to(DEVICE), modulated(1)
    up, down, gate = prepared(INTEGER, WIDE, D), prepared(INTEGER, D, WIDE), rand(N, 1, D)
    whole = added_feed_forward(x, norm, up, down, gate)
    monkeypatch.setattr(configurations, "tokens_together", lambda *_: step)
    assert torch.equal(added_feed_forward(x, norm, up, down, gate), whole)


@torch.no_grad()
def test_a_residual_in_another_dtype_is_added_after() -> None:
    layer, x, y = prepared(INTEGER, D, D), inputs(N, S, D).to(DEVICE), rand(N, S, D, dtype=torch.float16)
    assert torch.equal(added_linear(x, layer, y, None), add_gated(y, layer(x), None))


def test_blocks_of_tokens_fit_the_cache_or_are_all() -> None:
    wan, large = (1536, 8960, 2), (5120, 13824, 2)
    step = configurations.tokens_together(32760, *wan, 50 * 2**20)
    assert step == 1408 and 1536 * 8960 + step * 8960 * 3 <= 50 * 2**20
    for tokens, sizes, cache in ((32760, large, 50 * 2**20), (32760, wan, 6 * 2**20), (1000, wan, 50 * 2**20), (9, wan, 0)):
        assert configurations.tokens_together(tokens, *sizes, cache) == tokens


FAMILIES: dict[str, Any] = {"wan": (wan.WanFamily, wan), "cogvideox": (cogvideox.CogVideoXFamily, cogvideox)}


def a_model(family: str) -> Any:
    of_family, module = FAMILIES[family]
    model = module.tiny_transformer().eval()
    for block in model.blocks if family == "wan" else ():  # random tables would leave the gates at nearly nothing
        block.scale_shift_table.data.mul_(20)
    prepare_(model, QuantScheme(timestep_groups=4), default_targets=of_family.default_targets)
    convert_(model)
    assert fuse_(model) == 2
    return model


def model_inputs(family: str, device: str, seed: int = 0) -> dict[str, Any]:
    shape = (1, 4, 3, 4, 4) if family == "wan" else (1, 3, 4, 4, 4)
    latents, text = (rand(*shape, seed=seed).to(device) for shape in (shape, (1, 8, 16)))
    timestep = torch.tensor([100.0 + seed], device=device)
    return {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": text, "return_dict": False}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_against_the_reference(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = a_model(family), model_inputs(family, "cpu")
    monkeypatch.setenv("QVGEN_KERNELS", "reference")
    (expected,) = copy.deepcopy(model)(**inputs)
    monkeypatch.delenv("QVGEN_KERNELS")
    (y,) = model.to(DEVICE)(**model_inputs(family, DEVICE))
    assert {layer.backend for _, layer in packed_layers(model)} == {"triton"}
    # On a GPU float32 sums of what is not packed round otherwise, and move a few codes.
    assert (y.cpu() - expected).norm() < (1e-6 if DEVICE == "cpu" else 2e-2) * expected.norm()


if DEVICE == "cuda":

    @torch.no_grad()
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_cuda_graph_records_a_whole_model(family: str) -> None:
        model, inputs, others = a_model(family).to(DEVICE), model_inputs(family, DEVICE), model_inputs(family, DEVICE, seed=9)
        model(**inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (y,) = model(**inputs)
        for name, tensor in inputs.items():
            if isinstance(tensor, torch.Tensor):
                tensor.copy_(others[name])
        graph.replay()
        assert torch.equal(y, model(**others)[0])
