"""Gradients of and through packed layers equal those of fake quantization; and every backend takes inputs of any strides."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qvgen.integrations.fused import fuse_
from qvgen.kernels import KernelPreference
from qvgen.models.cogvideox import CogVideoXFamily
from qvgen.models.cogvideox import tiny_transformer as tiny_cogvideox_transformer
from qvgen.models.wan import WanFamily
from qvgen.models.wan import tiny_transformer as tiny_wan_transformer
from qvgen.nn.layers_together import feed_forward, linears
from qvgen.nn.packed_linear import PackedLinear
from qvgen.nn.swap import convert_, prepare_
from qvgen.nn.timestep import group_of, set_timestep
from qvgen.quant.fake_quantizer import ActivationQuantizer
from qvgen.quant.scheme import QuantArgs, QuantScheme
from tests.support.packed_reference import build, inputs, scheme_of

# A sum in another order, and clips that went through a logit and back.
RELATIVE = 1e-4
# Through a whole model: where sums in another order moved an input's code by one, as in test_fused_blocks.py.
MODEL_RELATIVE = 2e-2
W8A8 = QuantScheme(weights=QuantArgs(num_bits=8), input_activations=QuantArgs(num_bits=8, strategy="token"), timestep_groups=4)


def fake_quantized(layer: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    activations = layer.scheme.input_activations
    if activations is not None:
        quantizer = ActivationQuantizer(activations, layer.input_clip_lower, layer.input_clip_upper)
        x = quantizer(x, group_of(x, layer.scheme.timestep_groups))
    return F.linear(x, layer.dequantize(), layer.bias)


def gradient(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    return torch.autograd.grad((y * seed).sum(), x)[0]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kernels", [KernelPreference.REFERENCE, KernelPreference.AUTO])
@pytest.mark.parametrize("activation_bits", [4, 8, None])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_layer(symmetric: bool, activation_bits: int | None, kernels: KernelPreference) -> None:
    scheme = scheme_of(QuantArgs(symmetric=symmetric), 4, activation_bits or 8, symmetric)
    if activation_bits is None:
        scheme = scheme.model_copy(update={"input_activations": None})
    layer, _ = build(scheme, 24, 48)
    layer.prepare_backend(kernels)
    set_timestep(torch.tensor([20.0, 900.0]))
    x = inputs(2, 5, 48).requires_grad_()
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(y, layer(x))
    assert relative(gradient(y, x), gradient(fake_quantized(layer, x), x)) < RELATIVE


def test_layers_together() -> None:
    scheme = scheme_of(QuantArgs(), 8, 8, symmetric=False)
    up, down = build(scheme, 96, 48)[0], build(scheme, 48, 96, seed=1)[0]
    set_timestep(torch.tensor([20.0, 900.0]))
    x = inputs(2, 5, 48).requires_grad_()
    expected = fake_quantized(down, F.gelu(fake_quantized(up, x), approximate="tanh"))
    assert relative(gradient(feed_forward(x, up, down), x), gradient(expected, x)) < MODEL_RELATIVE
    for y, layer in zip(linears(x, [up, up]), [up, up], strict=True):
        assert relative(gradient(y, x), gradient(fake_quantized(layer, x), x)) < RELATIVE
    with pytest.raises(RuntimeError, match="forward_into has no gradient"):
        up.forward_into(x, torch.empty(2, 5, 96))


def test_a_bias() -> None:
    layer, _ = build(scheme_of(QuantArgs(), 8, 8, symmetric=False), 6, 32)
    set_timestep(torch.tensor([20.0]))
    assert layer.bias is not None
    layer.bias.requires_grad_()
    x = inputs(2, 5, 32)
    torch.testing.assert_close(
        gradient(layer(x), layer.bias), gradient(F.linear(x, layer.dequantize(), layer.bias), layer.bias)
    )


def models(family: str) -> tuple[Any, Any, dict[str, Any]]:
    """A fake-quantized model, the same packed, and arguments."""
    wan = "wan" in family
    trained: Any = tiny_wan_transformer() if wan else tiny_cogvideox_transformer()
    targets = WanFamily.default_targets if wan else CogVideoXFamily.default_targets
    prepare_(trained, W8A8, default_targets=targets)
    packed = copy.deepcopy(trained)
    convert_(packed)
    if "fused" in family:
        assert fuse_(packed) == 2
    generator = torch.Generator().manual_seed(3)
    arguments = {
        "hidden_states": torch.randn((2, 4, 3, 4, 4) if wan else (2, 3, 4, 4, 4), generator=generator),
        "timestep": torch.tensor([100.0, 800.0]),
        "encoder_hidden_states": torch.randn(2, 8, 16, generator=generator),
        "return_dict": False,
    }
    return trained, packed, arguments


@pytest.mark.parametrize("family", ["wan", "fused wan", "cogvideox", "fused cogvideox"])
def test_the_gradient_of_the_latents(family: str) -> None:
    trained, packed, arguments = models(family)
    latents = arguments["hidden_states"].requires_grad_()
    expected, found = (gradient(model(**arguments)[0], latents) for model in (trained, packed))
    assert relative(found, expected) < MODEL_RELATIVE


@pytest.mark.slow
@pytest.mark.parametrize("family", ["wan", "fused wan", "fused cogvideox"])
def test_compiles_whole_without_no_grad(family: str) -> None:
    _, packed, arguments = models(family)
    expected = packed(**arguments)[0]
    assert expected.requires_grad  # parameters outside the packed layers ask for it
    torch.compiler.reset()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments)[0], expected, rtol=1e-3, atol=1e-3)


STRIDES = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand(3, -1, -1),
    "sliced": lambda x: torch.cat([x, x], -1)[..., ::2],
    "permuted": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "4-d permuted": lambda x: x.unflatten(1, (2, 3)).transpose(1, 2),
}


@pytest.mark.parametrize("kernels", [KernelPreference.REFERENCE, KernelPreference.AUTO])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strides", STRIDES)
def test_inputs_of_any_strides(strides: str, dtype: torch.dtype, kernels: KernelPreference) -> None:
    layers = [build(scheme_of(QuantArgs(), 4, 4, symmetric=False), n, k)[0] for n, k in ((5, 32), (64, 32), (32, 64))]
    for layer in layers:
        layer.prepare_backend(kernels)
    set_timestep(torch.tensor([500.0]))
    x = STRIDES[strides](inputs(3, 6, 32).to(dtype))
    dense = x.contiguous()
    assert torch.equal(layers[0](x), layers[0](dense))
    assert all(torch.equal(a, b) for a, b in zip(linears(x, layers[:2]), linears(dense, layers[:2]), strict=True))
    assert torch.equal(feed_forward(x, *layers[1:]), feed_forward(dense, *layers[1:]))
