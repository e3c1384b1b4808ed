"""Launches of the kernels: sizes, strides and configurations. No host synchronisation and no memory but torch's allocator's,
so that a CUDA graph can record them.

Imports triton: only backend.py imports this module, once the backend runs.
"""
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# A kernel's launch takes num_warps and the like, and its language is Triton's, neither of which pyright can know.

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from qvgen.kernels.fused_ops import Gated, Norm
from qvgen.kernels.registry import Arguments, LayerTensors
from qvgen.kernels.triton import configurations
from qvgen.kernels.triton.architectures import ARCHITECTURES, Architecture, of
from qvgen.kernels.triton.gemm import integer_gemm_kernel, weight_only_kernel
from qvgen.kernels.triton.layout import PLANES, planes
from qvgen.kernels.triton.planes import unpack_kernel
from qvgen.kernels.triton.tokens import quantize_tokens_kernel

MOST_SETS = 3  # layers whose codes one read of x gives
_ALIGNMENT = 16  # bytes of a row of codes
E4M3_BITS = 4  # codes of so many bits, less their middle, are whole numbers from -8 to 7: exact in e4m3


class Codes(NamedTuple):
    """A layer's input as quantize_tokens_kernel writes it."""

    codes: Tensor  # (M, stride) int8, or e4m3
    scale: Tensor  # (M,) float32
    zero_point: Tensor  # (M,) int32, less 2^(bits - 1)
    sums: Tensor  # (M, G) int32


def architecture_of(device: torch.device) -> Architecture:
    """Of a GPU that `available` let through; of the interpreter's CPU the oldest."""
    found = of(torch.cuda.get_device_capability(device)) if device.type == "cuda" else ARCHITECTURES[0]
    assert found is not None
    return found


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def cache_bytes(device: torch.device) -> int:
    """Of the L2 cache; 0 where there is none to speak of."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def uses_e4m3(architecture: Architecture, weight_bits: int, activation_bits: int, groups: int) -> bool:
    # Not with groups: totals beside sums spill there.
    return architecture.e4m3 and groups == 1 and max(weight_bits, activation_bits) <= E4M3_BITS


def rows_of(x: Tensor) -> Tensor:
    """x as (M, K) with K contiguous; a view where its strides allow one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def empty_codes(m: int, k: int, groups: int, e4m3: bool, device: torch.device) -> Codes:
    """Memory for the codes of m tokens of k values."""
    stride = -(-k // _ALIGNMENT) * _ALIGNMENT
    return Codes(
        torch.empty((m, stride), dtype=torch.float8_e4m3fn if e4m3 else torch.int8, device=device),
        torch.empty(m, dtype=torch.float32, device=device),
        torch.empty(m, dtype=torch.int32, device=device),
        torch.empty((m, groups), dtype=torch.int32, device=device),
    )


def quantize_tokens(
    x: Tensor, layers: Sequence[LayerTensors], arguments: Arguments, e4m3: bool, norm: Norm | None = None
) -> list[Codes]:
    """Codes of x (n, ..., K), or of its layer norm, for up to MOST_SETS layers."""
    rows = rows_of(x)
    results = [empty_codes(*rows.shape, layer.weight_scale.shape[1], e4m3, x.device) for layer in layers]
    quantize_rows(rows, layers, arguments, results, 0, tokens_per_group(x, arguments), norm)
    return results


def tokens_per_group(x: Tensor, arguments: Arguments) -> int:
    """Tokens of x (n, ..., K) that share an entry of `timestep_group`."""
    group = arguments.timestep_group
    assert group is not None
    return x.shape[:-1].numel() // len(group)


def quantize_rows(
    rows: Tensor,
    layers: Sequence[LayerTensors],
    arguments: Arguments,
    results: Sequence[Codes],
    first: int,
    tokens_per_group: int,
    norm: Norm | None = None,
) -> None:
    """Write the codes of tokens `first`, ... to `results`, one for each layer; rows (M, K), K contiguous."""
    group, bits = arguments.timestep_group, arguments.activation_bits
    assert group is not None and bits is not None and 1 <= len(layers) <= MOST_SETS
    m, k = rows.shape
    pointers, clips = [], []
    for layer, result in zip(layers, results, strict=True):
        lower, upper = layer.clip_lower, layer.clip_upper
        assert lower is not None and upper is not None
        pointers.append((lower.contiguous(), upper.contiguous(), *result))
        clips.append(len(lower))
    missing = MOST_SETS - len(layers)
    pointers += [pointers[0]] * missing  # not touched: SETS says how many there are
    clips += [clips[0]] * missing
    groups = layers[0].weight_scale.shape[1]
    block_g, block_k = triton.next_power_of_2(groups), triton.next_power_of_2(k // groups)
    parameters = () if norm is None else norm[:4]
    modulation = None if norm is None else norm.modulation
    with on(rows.device):
        quantize_tokens_kernel[(m,)](
            rows,
            group.contiguous(),
            *[tensor for of_layer in pointers for tensor in of_layer],
            *clips,
            *[rows if tensor is None else tensor.contiguous() for tensor in parameters or [None] * 4],
            rows.stride(0),
            first,
            tokens_per_group,
            1 if modulation is None else m // len(modulation),
            0.0 if norm is None else norm.eps,
            CODES_STRIDE=results[0].codes.shape[1],
            GROUPS=groups,
            GROUP_SIZE=k // groups,
            BLOCK_G=block_g,
            BLOCK_K=block_k,
            BITS=bits,
            SYMMETRIC=arguments.activation_symmetric,
            SETS=len(layers),
            NORM=norm is not None,
            HAS_WEIGHT=norm is not None and norm.weight is not None,
            HAS_BIAS=norm is not None and norm.bias is not None,
            HAS_SCALE=norm is not None and norm.scale is not None,
            HAS_SHIFT=norm is not None and norm.shift is not None,
            PER_TOKEN=modulation is not None and modulation.shape[1] > 1,
            num_warps=configurations.row_warps(block_g * block_k),
            enable_fp_fusion=False,
        )


def unpack(layer: LayerTensors, k: int, weight_bits: int, dtype: torch.dtype, dequantize: bool) -> Tensor:
    """The layer's codes (N, K) in int8 or e4m3, or its values in `dtype`; memory that torch's allocator uses again."""
    n, groups = layer.weight_scale.shape
    if weight_bits not in PLANES and not dequantize and dtype == torch.int8:
        return layer.weight
    size = k // groups
    count, width, _ = planes(size, weight_bits)
    out = torch.empty((n, k), dtype=dtype, device=layer.weight.device)
    block_n, block_j = 16, min(128, triton.next_power_of_2(width))
    grid = (triton.cdiv(n, block_n), groups * triton.cdiv(width, block_j))
    with on(out.device):
        unpack_kernel[grid](
            layer.weight,
            out,
            layer.weight_scale,
            layer.weight_scale if layer.weight_zero_point is None else layer.weight_zero_point,
            n,
            GROUPS=groups,
            GROUP_SIZE=size,
            WIDTH=width,
            OUT_STRIDE=k,
            BITS=weight_bits,
            PLANES=count,
            DEQUANTIZE=dequantize,
            ASYMMETRIC=layer.weight_zero_point is not None,
            BLOCK_N=block_n,
            BLOCK_J=block_j,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out


def integer_linear(
    codes: Codes,
    layer: LayerTensors,
    weight_bits: int,
    k: int,
    gelu: bool,
    y: Tensor,
    gated: Gated | None = None,
    unpacked: Tensor | None = None,
) -> None:
    """Write the layer's output, or with `gated` its sum with the residual, to y (..., N), contiguous, from the codes of its
    input (M, K). `unpacked`: what `unpack` made of the layer, where the caller has it."""
    m, (n, groups) = len(codes.codes), layer.weight_scale.shape
    architecture, size = architecture_of(y.device), k // groups
    in_loop = unpacked is None and configurations.unpacks_in_loop(m, groups, weight_bits)
    weight = layer.weight if in_loop else unpacked
    if weight is None:
        weight = unpack(layer, k, weight_bits, codes.codes.dtype, False)
    gate = None if gated is None else gated.gate
    stored = weight_bits if in_loop else 8
    count, width, _ = planes(size, stored)
    e4m3 = codes.codes.dtype != torch.int8
    gate_per_token = gate is not None and gate.shape[1] > 1
    many_registers = gated is not None and (e4m3 or (gate_per_token and y.dtype == torch.float32))
    tile = configurations.gemm(architecture, m, groups, size, weight_bits if in_loop else None, many_registers)
    grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)
    with on(y.device):
        integer_gemm_kernel[grid](
            codes.codes.view(torch.int8),
            codes.scale,
            codes.zero_point,
            codes.sums,
            weight.view(torch.int8) if e4m3 and not in_loop else weight,
            layer.weight_scale,
            layer.weight_scale if layer.weight_zero_point is None else layer.weight_zero_point,
            layer.weight_row_sum,
            layer.weight_scale if layer.bias is None else layer.bias.contiguous(),
            y if gated is None else gated.residual.contiguous(),
            y if gate is None else gate.contiguous(),
            y,
            m,
            n,
            1 if gate is None else m // len(gate),
            A_STRIDE=codes.codes.shape[1],
            W_STRIDE=weight.shape[1],
            GROUPS=groups,
            GROUP_SIZE=size,
            WIDTH=width,
            WEIGHT_BITS=weight_bits,
            STORED_BITS=stored,
            PLANES=count,
            ASYMMETRIC=layer.weight_zero_point is not None,
            HAS_BIAS=layer.bias is not None,
            GELU=gelu,
            RESIDUAL=gated is not None,
            HAS_GATE=gate is not None,
            PER_TOKEN=gate_per_token,
            E4M3=e4m3,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            SWIZZLE=tile.swizzle,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=e4m3,  # without, sums in e4m3 spill on sm_103; with, a residual is added in one rounding less
        )


def weight_only_in_loop(x: Tensor, layer: LayerTensors, weight_bits: int, gelu: bool, y: Tensor) -> bool:
    """Write the layer's output of a 16-bit x (n, ..., K) to y (..., N), its weight unpacked inside the product. Returns False,
    and writes nothing, where a whole layer is better unpacked first, or x is wider."""
    rows, (n, groups) = rows_of(x), layer.weight_scale.shape
    m, k = rows.shape
    if x.dtype not in (torch.bfloat16, torch.float16) or not configurations.unpacks_in_loop(m, groups, weight_bits):
        return False
    if not m:
        return True
    count, width, _ = planes(k, weight_bits)
    tile = configurations.weight_only(m, weight_bits)
    with on(y.device):
        weight_only_kernel[(triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)](
            rows,
            layer.weight,
            layer.weight_scale,
            layer.weight_scale if layer.weight_zero_point is None else layer.weight_zero_point,
            layer.weight_scale if layer.bias is None else layer.bias.contiguous(),
            y,
            m,
            n,
            X_STRIDE=rows.stride(0),
            W_STRIDE=layer.weight.shape[1],
            K=k,
            WIDTH=width,
            WEIGHT_BITS=weight_bits,
            PLANES=count,
            ASYMMETRIC=layer.weight_zero_point is not None,
            HAS_BIAS=layer.bias is not None,
            GELU=gelu,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return True
