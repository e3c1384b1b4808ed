"""Uniform affine quantization. The only file of the library that rounds.

Codes are unsigned in [0, P], P = 2**num_bits - 1, for symmetric quantizers too (their zero point is 2**(num_bits - 1)).
Rounding is half to even. The definition, shared by training, the packed model and every kernel backend:

    integer zero point   q = clamp(round(x / s) + z, 0, P)
    float zero point     q = clamp(round(x / s + z), 0, P)
    both                 x^ = s (q - z)

The quotient is computed as a quotient: `x * (1 / s)` rounds differently at ties. Gradients: rounding has gradient 1 (straight
through), the clamp keeps its own, which together give the LSQ+ gradients of scale and zero point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from qvgen.device import widest_float
from qvgen.quant.scheme import QuantArgs


class FusedFakeQuantize(Protocol):
    """Kernels of fake quantization, which do in one pass what _FakeQuantize does in several."""

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, args: QuantArgs, dtype: torch.dtype
    ) -> torch.Tensor: ...

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, args: QuantArgs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


# (x, scale, zero_point, args, dtype of the output) -> kernels that run there; set by qvgen.kernels, which lies above.
choose_fused: Callable[..., FusedFakeQuantize | None] = lambda *_: None  # noqa: E731


class _RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return grad


def round_ste(x: torch.Tensor) -> torch.Tensor:
    """Round half to even, with gradient 1."""
    return _RoundStraightThrough.apply(x)


def codes(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, args: QuantArgs) -> torch.Tensor:
    """Codes of `x` in its own floating dtype, not differentiable; `scale` and `zero_point` broadcast against `x`."""
    return _unclamped_codes(x.detach(), scale.detach(), zero_point.detach(), args).clamp_(0, args.max_code)


def dequantize(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Values s (q - z) of codes, in the dtype of `scale`."""
    return scale * (q.to(scale.dtype) - zero_point)


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, args: QuantArgs) -> torch.Tensor:
    """`x` as its quantized values, differentiable in x, scale and zero_point.

    One grid per last dimension: `scale` and `zero_point` are (..., 1) for x (..., K). Computed in float32 for x of any dtype;
    the result is float32, or under autocast in its dtype. What is kept for the backward pass is x and the grid, no tensor
    that is not there anyway: codes are made again.
    """
    return _FakeQuantize.apply(x, scale, zero_point, args)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A context in which nothing is cast to 16 bits."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _unclamped_codes(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, args: QuantArgs) -> torch.Tensor:
    if args.zero_point_domain == "float":
        return (x / scale).add_(zero_point).round_()
    return (x / scale).round_().add_(zero_point)


class _FakeQuantize(torch.autograd.Function):
    """Closed form of the gradients: fewer passes than recording each elementwise step (LOG.md).

    With m = 1 where the code was not clamped: dx^/dx = m, dx^/dz = -s (1 - m), dx^/ds = (x^ - m x) / s. Codes computed
    again from the same numbers are the same, so the gradients are bit for bit those of codes that were kept; keeping them
    doubled the memory of a block (docs/scale.md).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, args: QuantArgs) -> torch.Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.args, kind = args, x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else scale.dtype
        ctx.fused = choose_fused(x, scale, zero_point, args, dtype)
        return (quantized if ctx.fused is None else ctx.fused.forward)(x, scale, zero_point, args, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        if ctx.fused is not None:
            return *ctx.fused.backward(grads[0], x, scale, zero_point, ctx.args), None
        return *gradients(grads[0], x, scale, zero_point, ctx.args, ctx.needs_input_grad), None


def quantized(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, args: QuantArgs, dtype: torch.dtype
) -> torch.Tensor:
    """What `fake_quantize` returns, in `dtype`, by PyTorch's operations."""
    q = _unclamped_codes(x.to(scale.dtype), scale, zero_point, args).clamp_(0, args.max_code)
    return q.sub_(zero_point).mul_(scale).to(dtype)


def gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    args: QuantArgs,
    needed: Sequence[bool] = (True, True, True),
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Those of x, scale and zero_point that are `needed`, by PyTorch's operations."""
    grad, kept = grad.to(scale.dtype), x.to(scale.dtype)
    q = _unclamped_codes(kept, scale, zero_point, args)
    clamped = q.clamp(0, args.max_code)
    grad_x = grad.masked_fill(clamped != q, 0)
    grad_scale = grad_zero_point = None
    if needed[1]:  # dot products: no temporary of the size of x
        values = clamped.sub_(zero_point).mul_(scale)
        with without_autocast(x.device.type):
            by_scale = torch.linalg.vecdot(grad, values) - torch.linalg.vecdot(grad_x, kept)
        grad_scale = by_scale.unsqueeze(-1) / scale
    if needed[2]:
        grad_zero_point = scale * (grad_x.sum(-1, keepdim=True) - grad.sum(-1, keepdim=True))
    return (grad_x.to(x.dtype) if needed[0] else None), grad_scale, grad_zero_point


def range_to_grid(lower: torch.Tensor, upper: torch.Tensor, args: QuantArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point whose codes cover [lower, upper], extended to contain 0.

    Without that extension the clamp of an integer zero point to [0, P] shifts every value (a token in [5, 6] would come
    back as 1). An empty range (only zeros) gets scale 1. A range that is not finite gives a NaN scale, so that NaN and Inf
    in the input come out as NaN instead of as plausible numbers.
    """
    lower, upper = lower.clamp(max=0), upper.clamp(min=0)
    if args.symmetric:
        bound = torch.maximum(-lower, upper)
        width = bound / (args.symmetric_zero_point - 1)
    else:
        width = (upper - lower) / args.max_code
    scale = torch.where(width == 0, torch.ones_like(width), width)
    scale = scale + 0 * scale  # Inf becomes NaN
    if args.symmetric:
        return scale, torch.full_like(scale, args.symmetric_zero_point)
    zero_point = -lower / scale
    if args.zero_point_domain == "integer":
        zero_point = round_ste(zero_point).clamp(0, args.max_code)
    return scale, zero_point


def token_grid(
    x: torch.Tensor, clip_lower: torch.Tensor, clip_upper: torch.Tensor, args: QuantArgs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic grid of each token: scale and zero point (..., 1) for x (..., K).

    The token's minimum and maximum are multiplied by the learned clips, which must broadcast against (..., 1).
    Source: QVGen section 4.1; the public code applies the clip twice.
    """
    x = x.detach()
    # Not aminmax: along a dimension it is not vectorized on the CPU, and takes nine times as long as these two passes.
    lower, upper = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    # Zero is put into the range before the clips: they shrink the two sides of zero.
    return range_to_grid(clip_lower * lower.clamp(max=0), clip_upper * upper.clamp(min=0), args)


NUM_TRAIN_TIMESTEPS = 1000  # the library numbers noise levels 0 (clean) to 1000 (noise); a family with others is refused


def timestep_group(timestep: torch.Tensor, groups: int, num_train_timesteps: int) -> torch.Tensor:
    """Group index floor(G t / T) of each timestep, int64, the last group closed at t = T.

    One rule for training, evaluation and the packed model, whatever the number of sampling steps (the public code uses
    t % 50 of the first sample of the batch, and a call counter at inference).
    """
    group = torch.floor(timestep.to(widest_float(timestep.device)) * groups / num_train_timesteps)
    return group.to(torch.int64).clamp(0, groups - 1)
