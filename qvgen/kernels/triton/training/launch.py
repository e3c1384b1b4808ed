"""Where the fused fake quantization runs, and its launches. Triton is imported once it does."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# As triton/launch.py.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qvgen.kernels import registry
from qvgen.kernels.triton.backend import missing
from qvgen.kernels.triton.training import self_check
from qvgen.kernels.triton.training.self_check import Kernels
from qvgen.quant.scheme import QuantArgs

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs(x: Tensor, args: QuantArgs, dtype: torch.dtype) -> bool:
    """Whether x is on a GPU that has the kernels, and they agree there with PyTorch's code (self_check.py);
    QVGEN_KERNELS=reference turns them off.

    Raises RuntimeError under QVGEN_KERNELS=triton on a GPU where they cannot run, or do not agree.
    """
    wanted = registry.preference()
    if wanted is registry.KernelPreference.REFERENCE or not on_gpu(x) or x.dtype not in _DTYPES:
        return False
    forced = wanted is registry.KernelPreference.TRITON
    reason = missing(x.device)
    if not reason:
        # Compiled, PyTorch's code is one pass too, and what is traced cannot be compared.
        return not torch.compiler.is_compiling() and self_check.agree(Kernels(forward, backward), x, args, dtype, forced)
    if forced:
        raise RuntimeError(f"{registry.ENVIRONMENT}=triton asks for kernels that cannot run: {reason}")
    return False


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def forward(x: Tensor, scale: Tensor, zero_point: Tensor, args: QuantArgs, dtype: torch.dtype) -> Tensor:
    """The quantized x in `dtype`."""
    from qvgen.kernels.triton.launch import on
    from qvgen.kernels.triton.training.kernels import fake_quantize_kernel

    x, y = x.contiguous(), torch.empty(x.shape, dtype=dtype, device=x.device)
    with on(x.device):
        fake_quantize_kernel[(scale.numel(),)](x, scale.contiguous(), zero_point.contiguous(), y, **_options(x, args))
    return y


def backward(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, args: QuantArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, in its dtype, of scale and of zero_point."""
    from qvgen.kernels.triton.launch import on
    from qvgen.kernels.triton.training.kernels import fake_quantize_backward_kernel

    x = x.contiguous()
    by_scale, by_zero_point = (torch.empty(scale.shape, dtype=torch.float32, device=x.device) for _ in range(2))
    results = torch.empty_like(x), by_scale, by_zero_point
    with on(x.device):
        fake_quantize_backward_kernel[(scale.numel(),)](
            grad.contiguous(), x, scale.contiguous(), zero_point.contiguous(), *results, **_options(x, args)
        )
    return results


def _options(x: Tensor, args: QuantArgs) -> dict[str, Any]:
    from qvgen.kernels.triton.configurations import row_warps

    k = x.shape[-1]
    block = 1 << (k - 1).bit_length()
    return {
        "K": k, "BLOCK": block, "LARGEST": args.max_code, "FLOAT_ZERO_POINT": args.zero_point_domain == "float",
        "num_warps": row_warps(block), "enable_fp_fusion": False,
    }  # fmt: skip
