"""Packed layers to test, and what they compute, in numpy: codes in float32, sums in int64, the rest in float64."""

import numpy as np
import torch

from qvgen.nn.packed_linear import PackedLinear
from qvgen.nn.timestep import group_of, set_timestep
from qvgen.packing.bits import unpack
from qvgen.quant.fake_quantizer import WeightQuantizer
from qvgen.quant.scheme import QuantArgs, QuantScheme

GROUPS = 5
# Roundings of the epilogue: two products with scales, one with a float zero point, one subtraction, one bias.
EPILOGUE_ULPS = 6 * np.finfo(np.float32).eps

WEIGHTS = [
    QuantArgs(symmetric=True),
    QuantArgs(zero_point_domain="integer"),
    QuantArgs(zero_point_domain="float"),
    QuantArgs(strategy="tensor"),
    QuantArgs(strategy="tensor", symmetric=True),
]


def scheme_of(weight: QuantArgs, weight_bits: int, activation_bits: int, symmetric: bool) -> QuantScheme:
    weight = weight.model_copy(update={"num_bits": weight_bits})
    activations = QuantArgs(num_bits=activation_bits, symmetric=symmetric, strategy="token")
    return QuantScheme(weights=weight, input_activations=activations, timestep_groups=GROUPS)


def build(scheme: QuantScheme, n: int, k: int, seed: int = 0, bias: bool = True) -> tuple[PackedLinear, torch.Tensor]:
    """A packed layer and the fake-quantized weight of training that it must equal."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) + 0.3
    quantizer = WeightQuantizer.min_max(scheme.weights, weight)
    clips = (None, None)
    if scheme.input_activations is not None:
        clips = tuple(0.5 + 0.5 * torch.rand(2, scheme.timestep_groups, generator=generator))
    layer = PackedLinear.from_codes(
        quantizer.codes(weight), *quantizer.export(), *clips, torch.randn(n, generator=generator) if bias else None, scheme
    )
    return layer, quantizer(weight).detach()


def inputs(samples: int, m: int, k: int, seed: int = 1) -> torch.Tensor:
    return 3 * torch.randn(samples, m, k, generator=torch.Generator().manual_seed(seed)) + 0.5


def reference(layer: PackedLinear, x: torch.Tensor, group: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The output (n, m, N) in float64 and the error that rounding in the epilogue may cause, by METHOD's formula."""
    args, tokens = layer.scheme.weights, layer.scheme.input_activations
    assert tokens is not None
    f32 = np.float32
    xs = x.float().numpy()
    per_sample = np.broadcast_to(group.numpy(), (len(xs),))
    lower_clip = layer.input_clip_lower.numpy()[per_sample][:, None, None]
    upper_clip = layer.input_clip_upper.numpy()[per_sample][:, None, None]
    lower = lower_clip * np.minimum(xs.min(-1, keepdims=True), f32(0))
    upper = upper_clip * np.maximum(xs.max(-1, keepdims=True), f32(0))
    top = 2**tokens.num_bits - 1
    whole = np.maximum(-lower, upper) / f32(2 ** (tokens.num_bits - 1) - 1)
    s_a = whole if tokens.symmetric else (upper - lower) / f32(top)
    s_a = np.where(s_a == 0, f32(1), s_a)
    z_a = f32(2 ** (tokens.num_bits - 1)) if tokens.symmetric else np.clip(np.rint(-lower / s_a), 0, top)
    z_a = np.broadcast_to(z_a, s_a.shape).astype(np.int64)
    q_a = np.clip(np.rint(xs / s_a) + z_a, 0, top).astype(np.int64)

    n, k = layer.out_features, layer.in_features
    q_w = unpack(layer.weight_packed, args.num_bits, k).numpy().astype(np.int64)
    s_w = np.broadcast_to(layer.weight_scale.numpy().astype(np.float64), (n, layer.weight_row_sum.shape[1]))
    if layer.weight_zero_point is None:
        z_w = np.full_like(s_w, 2 ** (args.num_bits - 1))
    else:
        z_w = np.broadcast_to(layer.weight_zero_point.numpy().astype(np.float64), s_w.shape)
    size = k // s_w.shape[1]
    total, allowed = np.zeros((*xs.shape[:-1], n)), np.zeros((*xs.shape[:-1], n))
    for g in range(s_w.shape[1]):
        a, w = q_a[..., g * size : (g + 1) * size], q_w[:, g * size : (g + 1) * size]
        sum_a, sum_w = a.sum(-1, keepdims=True), w.sum(-1)
        assert np.array_equal(layer.weight_row_sum[:, g].numpy(), sum_w)
        integer = a @ w.T - z_a * sum_w
        correction = z_w[:, g] * (sum_a - size * z_a)
        scale = s_a.astype(np.float64) * s_w[:, g]
        total += scale * (integer - correction)
        allowed += EPILOGUE_ULPS * np.abs(scale) * (np.abs(integer) + np.abs(correction) + 1)
    if layer.bias is not None:
        total = total + layer.bias.numpy()
        allowed = allowed + EPILOGUE_ULPS * np.abs(layer.bias.numpy())
    return total, allowed


def assert_equals_reference(layer: PackedLinear, x: torch.Tensor, timestep: torch.Tensor) -> None:
    set_timestep(timestep)
    expected, allowed = reference(layer, x, group_of(x, layer.scheme.timestep_groups))
    error = np.abs(layer(x).double().numpy() - expected)
    assert (error <= allowed).all(), f"error {error.max()}, allowed {allowed.flat[error.argmax()]}"
