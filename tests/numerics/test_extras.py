"""Layers that scale, rotate and have a branch: QATLinear and PackedLinear compute one function, the original's up to
quantization, on both families."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qvgen.models.cogvideox import CogVideoXFamily
from qvgen.models.cogvideox import tiny_transformer as tiny_cogvideox_transformer
from qvgen.models.wan import WanFamily
from qvgen.models.wan import tiny_transformer as tiny_wan_transformer
from qvgen.nn.layers_together import feed_forward, linears
from qvgen.nn.packed_linear import PackedLinear, packed_layers
from qvgen.nn.qat_linear import QATLinear
from qvgen.nn.swap import add_phi_, convert_, prepare_, qat_layers
from qvgen.nn.timestep import set_timestep
from qvgen.quant.grid import LayerGrid
from qvgen.quant.low_rank import low_rank_factors
from qvgen.quant.rotation import hadamard
from qvgen.quant.scheme import QuantArgs, QuantScheme
from qvgen.quant.search.mse import search_grid
from qvgen.quant.search.settings import SearchSettings
from qvgen.quant.smoothing import transform_weight

# Float32 sums in another order, relative to the largest value.
SUMS = 1e-5
# The same where fake quantization multiplies dequantized floats.
FAKE_QUANT_RELATIVE = 1e-4
# ... and where a whole model's roundings move a code by one, relative to the output's norm, at 8 bits.
CODE_FLIPS = 5e-3
# What 8-bit quantization of every layer costs the output of a two-layer model, relative to its norm.
EIGHT_BITS = 0.05

EXTRAS = [
    {"input_scaling": True},
    {"input_rotation": 8},
    {"low_rank": 2},
    {"input_scaling": True, "input_rotation": 8, "low_rank": 2},
]
N, K, GROUPS = 40, 48, 3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scheme_of(extras: dict, bits: int = 4, **other: object) -> QuantScheme:
    args = {"weights": QuantArgs(num_bits=bits), "input_activations": QuantArgs(num_bits=bits, strategy="token")}
    return QuantScheme(**{"timestep_groups": GROUPS, **args, **other, **extras})  # type: ignore[arg-type]


def grid_of(weight: torch.Tensor, scheme: QuantScheme) -> LayerGrid:
    """A grid with some scale and the branch of the weight that it makes."""
    n, k = weight.shape
    scale = 0.5 + 2 * torch.rand(k, generator=torch.Generator().manual_seed(k)) if scheme.input_scaling else None
    rank = scheme.rank_of(n, k)
    factors = low_rank_factors(transform_weight(weight.detach(), scale, scheme.input_rotation), rank) if rank else None
    inputs = [normal(64, k, seed=g) for g in range(scheme.timestep_groups)]
    settings = SearchSettings(weight_candidates=20, mse_exponent=2.4, clip_candidates=(0.95, 0.8))
    return search_grid(weight, inputs, scheme, settings, input_scale=scale, low_rank=factors)


def prepared(extras: dict, bits: int = 4, **other: object) -> tuple[nn.Linear, nn.Sequential]:
    """A layer, and a model of it alone, prepared."""
    torch.manual_seed(0)
    layer = nn.Linear(K, N)
    scheme = scheme_of(extras, bits, **other)
    model = nn.Sequential(copy.deepcopy(layer))
    prepare_(model, scheme, grids={"0": grid_of(layer.weight, scheme)})
    set_timestep(torch.tensor([10.0, 990.0]))
    return layer, model


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    torch.testing.assert_close(found, expected, rtol=relative, atol=relative * float(expected.detach().abs().max()))


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
def test_without_quantization_it_is_the_original_layer(extras: dict) -> None:
    layer, model = prepared(extras)
    model[0].weight_quantizer = nn.Identity()
    model[0].input_quantizer = None
    x = normal(2, 5, K)
    assert_close(model[0](x), layer(x), SUMS)
    assert not torch.allclose(model[0].weight, layer.weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
def test_packed_equals_training(extras: dict, bits: int) -> None:
    _, model = prepared(extras, bits)
    trained = model[0]
    dense = trained.weight_quantizer(trained.weight).detach()
    x = normal(2, 5, K)
    with torch.no_grad():
        expected = model[0](x)
        convert_(model)
        assert_close(model[0](x), expected, FAKE_QUANT_RELATIVE)
    assert torch.equal(model[0].dequantize(), dense)


def test_the_packed_layer_is_its_formula() -> None:
    """y = Q(W') Q(x') + up down x' + b, written out with the transformed input of a Hadamard matrix of its own."""
    _, model = prepared(EXTRAS[-1], bits=8)
    convert_(model)
    layer = model[0]
    x = normal(1, 5, K)
    blocks = torch.block_diag(*[hadamard(8)] * (K // 8))
    inner = (x / layer.input_scale) @ blocks
    plain = PackedLinear(K, N, True, layer.scheme.without_extras(), device="cpu")
    names = plain.state_dict().keys()
    plain.load_state_dict({name: tensor for name, tensor in layer.state_dict().items() if name in names})
    set_timestep(torch.tensor([500.0]))
    expected = plain(inner) + inner @ layer.low_rank_down.T @ layer.low_rank_up.T
    assert_close(layer(x), expected, SUMS)


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
def test_forward_into_and_shared_calls_are_the_layers_own(extras: dict) -> None:
    _, model = prepared(extras)
    _, other = prepared(extras, bits=4)
    convert_(model)
    convert_(other)
    layer, x = model[0], normal(2, 5, K)
    expected = layer(x)
    for gelu in (False, True):
        out = torch.full((2, 5, N), torch.nan)
        layer.forward_into(x, out, gelu)
        assert torch.equal(out, F.gelu(expected, approximate="tanh") if gelu else expected)
    with pytest.raises(ValueError, match=r"out must be of shape \(2, 5, 40\), not \(2, 1, 40\)"):
        layer.forward_into(x, torch.empty(2, 1, N))
    assert all(torch.equal(y, layer(x)) for y in linears(x, [layer, layer]))
    with pytest.raises(ValueError, match=f"input has {K - 1} features"):
        layer(x[..., 1:])


def test_feed_forward_is_the_layers_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, 80), nn.Linear(80, K))
    scheme = scheme_of(EXTRAS[-1])
    prepare_(model, scheme, grids={str(i): grid_of(model[i].weight, scheme) for i in range(2)})
    convert_(model)
    set_timestep(torch.tensor([10.0, 990.0]))
    x = normal(2, 5, K)
    up, down = model
    assert torch.equal(feed_forward(x, up, down), down(F.gelu(up(x), approximate="tanh")))


@pytest.mark.parametrize("activations", [True, False])
def test_bfloat16_differs_by_the_branch_and_the_last_rounding(activations: bool) -> None:
    other = {} if activations else {"input_activations": None}
    _, model = prepared(EXTRAS[-1], **other)
    convert_(model)
    x = normal(2, 5, K).bfloat16()
    expected = model[0](x.float())
    scale, dense = model[0].input_scale.clone(), model[0].dequantize()
    half = model.to(torch.bfloat16)
    found = half[0](x)
    assert found.dtype == torch.bfloat16
    assert half[0].input_scale.dtype == torch.float32 and torch.equal(half[0].input_scale, scale)
    assert half[0].low_rank_up.dtype == half[0].low_rank_down.dtype == half[0].bias.dtype == torch.bfloat16
    assert torch.equal(half[0].dequantize(), dense)
    assert_close(found.float(), expected, 4 * torch.finfo(torch.bfloat16).eps)


def test_training_reaches_weight_and_branch_but_not_the_scale() -> None:
    _, model = prepared(EXTRAS[-1])
    add_phi_(model, 3)
    model[0](normal(2, 5, K)).square().mean().backward()
    layer = model[0]
    assert isinstance(layer, QATLinear) and layer.input_transform is not None
    graded = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"0.weight", "0.input_transform.low_rank_up", "0.input_transform.low_rank_down", "0.phi.phi_up"} <= graded
    assert not any("input_scale" in name for name, _ in model.named_parameters())
    # Φ is about what is packed, the residual.
    error = layer.weight.detach() - layer.weight_quantizer.dequantized(layer.weight)
    assert layer.phi is not None
    left = torch.linalg.svdvals(error)[3:].norm()
    torch.testing.assert_close((error - layer.phi.delta().detach()).norm(), left, rtol=1e-4, atol=0)


def test_a_prepared_state_loads_into_an_uncalibrated_twin() -> None:
    """What stage pack does: the same scheme without grids, and then the trained tensors."""
    layer, model = prepared(EXTRAS[-1])
    twin = nn.Sequential(copy.deepcopy(layer))
    prepare_(twin, scheme_of(EXTRAS[-1]))
    twin.load_state_dict(model.state_dict())
    set_timestep(torch.tensor([10.0, 990.0]))
    x = normal(2, 5, K)
    assert torch.equal(twin[0](x), model[0](x))


def test_the_model_that_was_copied_keeps_its_weight() -> None:
    layer = nn.Linear(K, N)
    before, scheme = layer.weight.detach().clone(), scheme_of(EXTRAS[-1])
    model = nn.Sequential(layer)
    prepare_(model, scheme, grids={"0": grid_of(layer.weight, scheme)})
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("calibrated", "scheme", "said"),
    [
        ({}, {"input_scaling": True}, r"grid of layer 0: input_scale is absent, this scheme needs \(48,\)"),
        ({"input_scaling": True}, {}, r"grid of layer 0: input_scale is \(48,\), this scheme needs none"),
        ({"low_rank": 1}, {"low_rank": 2}, r"low_rank_up is \(40, 1\), this scheme needs \(40, 2\)"),
        ({}, {"input_rotation": 32}, "in_features 48 is not a multiple of input_rotation 32; choose 16"),
    ],
)
def test_grids_of_another_scheme_are_refused(calibrated: dict, scheme: dict, said: str) -> None:
    layer = nn.Linear(K, N)
    with pytest.raises(ValueError, match=said):
        prepare_(nn.Sequential(layer), scheme_of(scheme), grids={"0": grid_of(layer.weight, scheme_of(calibrated))})


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
def test_both_families(family: str, extras: dict) -> None:
    if "input_rotation" in extras:
        extras = extras | {"input_rotation": 4}  # CogVideoX's timestep embedding is 12 wide
    model = tiny_wan_transformer() if family == "wan" else tiny_cogvideox_transformer()
    adapter = WanFamily(shift=3.0) if family == "wan" else CogVideoXFamily({})
    scheme = scheme_of(extras, bits=8)
    student = copy.deepcopy(model)
    targets = adapter.default_targets
    layers = prepare_(copy.deepcopy(model), scheme, default_targets=targets)
    grids = {name: grid_of(model.get_submodule(name).weight, scheme) for name in layers}
    prepare_(student, scheme, default_targets=targets, grids=grids)
    shape = (2, 4, 3, 4, 4) if family == "wan" else (2, 3, 4, 4, 4)
    latents, text, timestep = normal(*shape), normal(2, 8, 16, seed=1), torch.tensor([30.0, 900.0])
    weights = {name: layer.weight_quantizer(layer.weight).detach() for name, layer in qat_layers(student)}
    with torch.no_grad():
        original = adapter.predict(model, latents, timestep, text)
        trained = adapter.predict(student, latents, timestep, text)
        convert_(student)
        packed = adapter.predict(student, latents, timestep, text)
    assert (trained - original).norm() < EIGHT_BITS * original.norm()
    assert (packed - trained).norm() < CODE_FLIPS * trained.norm()
    for name, layer in packed_layers(student):
        assert torch.equal(layer.dequantize(), weights[name])
