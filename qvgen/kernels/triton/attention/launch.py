"""The GPU version of kernels/block_ops.py's attention_int8. Triton is imported once it runs."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# As triton/launch.py.

from __future__ import annotations

import math

import torch
from torch import Tensor

from qvgen.kernels.expressions import KEYS_TOGETHER

DTYPES = (torch.bfloat16, torch.float16)
MOST_FEATURES = 128  # of a head
_QUERIES = 128
_WARPS = 8  # with 4, heads of 64 spill on sm_120
_LEAST = 32  # features of a product of int8, on every architecture


def refusal(q: Tensor) -> str:
    """Why a q cannot be taken; empty if it can."""
    if q.dtype not in DTYPES:
        return f"inputs are {q.dtype}, not bfloat16 or float16: load the model with dtype=torch.bfloat16"
    d = q.shape[-1]
    return "" if d <= MOST_FEATURES else f"heads have {d} features, more than {MOST_FEATURES}"


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return not refusal(q) and q.numel() > 0 and k.numel() > 0


def attention_int8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As block_ops.py has it. Memory beside the result: a byte for each value of q and k, with heads of 32, 64 or 128."""
    import triton

    from qvgen.kernels.triton.attention.kernels import attention_int8_kernel
    from qvgen.kernels.triton.launch import on

    (n, queries, heads, d), keys = q.shape, k.shape[1]
    block_d = max(_LEAST, triton.next_power_of_2(d))
    v = v if v.stride(-1) == 1 else v.contiguous()
    y = torch.empty((n, queries, heads, d), dtype=q.dtype, device=q.device)
    with on(q.device):
        q_codes, q_scale = _eight_bits(q, None, block_d)
        k_codes, k_scale = _eight_bits(k, k.mean(1, dtype=torch.float32), block_d)
        attention_int8_kernel[(triton.cdiv(queries, _QUERIES), n * heads)](
            q_codes,
            q_scale,
            k_codes,
            k_scale,
            v,
            y,
            math.log2(math.e) / math.sqrt(d),
            queries,
            keys,
            heads,
            *v.stride()[:3],
            D=d,
            BLOCK_D=block_d,
            BLOCK_M=_QUERIES,
            BLOCK_N=KEYS_TOGETHER,
            num_warps=_WARPS,
            num_stages=3,
        )
    return y


def _eight_bits(x: Tensor, mean: Tensor | None, block_d: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of q, or with `mean` (n, heads, D) of k less that."""
    import triton

    from qvgen.kernels.triton.attention.kernels import eight_bits_kernel

    x = x if x.stride(-1) == 1 else x.contiguous()
    n, tokens, heads, d = x.shape
    codes = torch.empty((n * heads, tokens, block_d), dtype=torch.int8, device=x.device)
    scale = torch.empty((n * heads, tokens), dtype=torch.float32, device=x.device)
    eight_bits_kernel[(triton.cdiv(tokens, KEYS_TOGETHER), n * heads)](
        x,
        x if mean is None else mean,
        codes,
        scale,
        tokens,
        heads,
        *x.stride()[:3],
        D=d,
        BLOCK_D=block_d,
        TOKENS=KEYS_TOGETHER,
        KEYS=mean is not None,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return codes, scale
