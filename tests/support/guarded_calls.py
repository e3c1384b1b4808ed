"""Calls of every op and of the cpu backend with right and wrong arguments, their tensors in guarded memory.

    python -m tests.support.guarded_calls FIRST COUNT

makes the calls FIRST to FIRST + COUNT - 1, each from its own number. Before each it prints what it will do, so that the last
line says what ended the process. A call must return, or raise one of the errors that say what is wrong. Exit code 1: one
raised something else, or a call without a wrong argument failed.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qvgen.kernels import block_ops, fused_ops, linear_ops
from qvgen.kernels.cpu import library
from qvgen.kernels.cpu.backend import CpuBackend
from qvgen.kernels.registry import KernelPreference, PackedWeight
from qvgen.nn.packed_linear import PackedLinear
from qvgen.nn.timestep import set_timestep
from qvgen.quant.scheme import QuantArgs
from tests.support.guarded import Guard
from tests.support.packed_reference import build, scheme_of

TOLD = (ValueError, RuntimeError)  # what a wrong argument raises; torch's own refusals are RuntimeErrors
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool]
DTYPES += [torch.complex64, torch.float8_e4m3fn]
NUMBERS = [-(2**62), -1, 0, 1, 2, 3, 5, 8, 9, 16, 31, 33, 2**31, 2**62]
FLOATS = [0.0, -1.0, float("nan"), float("inf")]
BACKENDS = ["", "nope", "triton", "reference", "cpu"]

Call = tuple[str, Callable[..., Any], list[Any]]


def layers(chance: random.Random, shapes: Sequence[tuple[int, int]], backend: str, groups: bool) -> list[PackedLinear]:
    strategy = {"strategy": "group", "group_size": 8} if groups else {}
    weight = QuantArgs(symmetric=chance.random() < 0.5, **strategy)
    scheme = scheme_of(weight, chance.choice([2, 3, 4, 8]), chance.choice([2, 4, 8]), symmetric=chance.random() < 0.5)
    bias = chance.random() < 0.7
    found = [build(scheme, n, k, seed=index, bias=bias)[0] for index, (n, k) in enumerate(shapes)]
    for layer in found:
        layer.prepare_backend(KernelPreference(backend))
    return found


def linear_call(chance: random.Random) -> Call:
    backend, groups = chance.choice(["cpu", "cpu", "reference"]), chance.random() < 0.3
    k, n, hidden = 8 * chance.randint(1, 9), chance.randint(1, 70), 8 * chance.randint(1, 9)
    if not groups:
        k, hidden = k - chance.randint(0, 7), hidden - chance.randint(0, 7)
    shapes = [(n, k), (n + 3, k), (hidden, k), (n, hidden), (k, hidden)]
    first, second, up, down, back = layers(chance, shapes, backend, groups)
    samples = chance.randint(1, 3)
    set_timestep(torch.rand(samples) * 999)
    x = torch.randn(samples, chance.randint(1, 9), k).to(chance.choice(DTYPES[:3]))
    arguments = list(first._arguments(x))
    one, two, wide, narrow, last = (list(layer._tensors()) for layer in (first, second, up, down, back))
    pair, feed, fed = (list(map(list, zip(a, b, strict=True))) for a, b in ((one, two), (wide, narrow), (wide, last)))
    norm = [torch.randn(k), None, torch.randn(samples, 1, k), torch.randn(samples, 1, k), 1e-6]
    residual, gate = torch.randn(*x.shape[:-1], n), torch.randn(samples, 1, n)
    out = torch.empty(*x.shape[:-1], n, dtype=chance.choice(DTYPES[:2]))
    bits = arguments[1]
    calls: list[Call] = [
        ("quantized_linear", linear_ops.quantized_linear, [x, *one, *arguments, chance.random() < 0.5, None]),
        ("quantized_linear_out", linear_ops.quantized_linear_out, [x, *one, *arguments, out, False]),
        ("quantized_linears", linear_ops.quantized_linears, [x, *pair, *arguments]),
        ("quantized_feed_forward", linear_ops.quantized_feed_forward, [x, *feed, *arguments]),
        ("layer_norm_linears", fused_ops.layer_norm_linears, [x, *norm, *pair, *arguments]),
        ("linear_add_gated", fused_ops.linear_add_gated, [x, *one, *arguments, residual, gate]),
        ("layer_norm_feed_forward", fused_ops.layer_norm_feed_forward, [x, *norm, *fed, *arguments, torch.randn(x.shape)]),
        ("dequantized_weight", linear_ops.dequantized_weight, [*one[:4], k, bits, backend]),
    ]
    return chance.choice(calls)


def block_call(chance: random.Random) -> Call:
    n, s, heads, size = chance.randint(1, 3), chance.randint(1, 9), chance.randint(1, 3), chance.choice([2, 6, 16, 32, 64])
    d, dtype = heads * size, chance.choice(DTYPES[:3])

    def some(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape).to(dtype)

    def perhaps(*shape: int) -> Tensor | None:
        return some(*shape, dtype=chance.choice(DTYPES[:3])) if chance.random() < 0.7 else None

    rows = chance.choice([1, s])
    scale, shift = perhaps(n, rows, d), perhaps(n, rows, d)
    angle = some(1, s, 1, size, dtype=torch.float32) if chance.random() < 0.7 else None
    t = chance.randint(1, 9)
    calls: list[Call] = [
        ("layer_norm_modulate", block_ops.layer_norm_modulate, [some(n, s, d), perhaps(d), perhaps(d), scale, shift, 1e-6]),
        ("rms_norm_rotary", block_ops.rms_norm_rotary, [some(n, s, d), perhaps(d), angle, angle, heads, 1e-6]),
        ("add_gated", block_ops.add_gated, [some(n, s, d), some(n, s, d), perhaps(n, rows, d)]),
        ("attention", block_ops.attention, [some(n, s, heads, size), *(some(n, t, heads, size) for _ in range(2))]),
    ]
    return chance.choice(calls)


def stored_call(chance: random.Random) -> Call:
    (layer,) = layers(chance, [(chance.randint(1, 70), 8 * chance.randint(1, 9))], "reference", chance.random() < 0.3)
    args, activations = layer.scheme.weights, layer.scheme.input_activations
    tensors = [layer.weight_packed, layer.weight_scale, layer.weight_zero_point, layer.weight_row_sum, layer.in_features]

    def prepare(words: Any, scale: Any, zero_point: Any, row_sum: Any, in_features: Any) -> Tensor:
        prepared = CpuBackend().prepare(PackedWeight(words, scale, zero_point, row_sum, in_features, args, activations))
        return CpuBackend().stored_words(prepared, layer.in_features, args.num_bits)

    return "CpuBackend.prepare", prepare, tensors


def spoil_tensor(chance: random.Random, tensor: Tensor) -> Any:
    if tensor.is_meta or tensor.is_sparse:
        return tensor
    dim = chance.randrange(tensor.ndim) if tensor.ndim else 0
    size = tensor.shape[dim] if tensor.ndim else 1
    kinds: list[Callable[[], Any]] = [
        lambda: tensor.narrow(dim, 0, size - 1) if tensor.ndim and size else tensor,
        lambda: torch.cat([tensor, tensor], dim) if tensor.ndim else tensor,
        lambda: tensor.narrow(dim, 0, 0) if tensor.ndim else tensor,
        lambda: tensor.unsqueeze(dim),
        lambda: tensor.flatten(),
        lambda: tensor.select(dim, 0) if size and tensor.ndim else tensor,
        lambda: tensor.to(chance.choice(DTYPES)),
        lambda: torch.empty_like(tensor, device="meta"),
        lambda: tensor.reshape(-1)[:1].expand(tensor.shape) if tensor.numel() else tensor,
        lambda: tensor.mT if tensor.ndim > 1 else tensor.flip(0) if tensor.ndim else tensor,
        lambda: torch.full_like(tensor, chance.choice([-1, 2**20])) if tensor.dtype == torch.int64 else tensor,
        lambda: tensor.to_sparse() if tensor.dtype == torch.float32 else tensor,
        lambda: None,
    ]
    return chance.choice(kinds)()


def spoil(chance: random.Random, argument: Any) -> Any:
    if isinstance(argument, list):
        copied = list(argument)
        if not copied or chance.random() < 0.3:
            return copied[:-1] if chance.random() < 0.5 else copied * 2
        at = chance.randrange(len(copied))
        copied[at] = spoil(chance, copied[at])
        return copied
    if isinstance(argument, Tensor):
        return spoil_tensor(chance, argument)
    if isinstance(argument, bool):
        return not argument
    if isinstance(argument, str):
        return chance.choice(BACKENDS)
    if isinstance(argument, float):
        return chance.choice(FLOATS)
    return chance.choice(NUMBERS) if isinstance(argument, int) else torch.randn(chance.randint(0, 9))


def guarded(guard: Guard, chance: random.Random, argument: Any) -> Any:
    if isinstance(argument, list):
        return [guarded(guard, chance, entry) for entry in argument]
    if not isinstance(argument, Tensor) or argument.is_meta or argument.is_sparse:
        return argument
    if argument.is_contiguous():
        return guard.copy(argument, at_end=chance.random() < 0.8)
    span = 1 + sum((n - 1) * step for n, step in zip(argument.shape, argument.stride(), strict=True))
    memory = guard.copy(argument.as_strided((span,), (1,)))  # views keep their strides, and end where their memory does
    return memory.as_strided(argument.shape, argument.stride())


def shown(argument: Any) -> str:
    if isinstance(argument, list):
        return f"[{', '.join(map(shown, argument))}]"
    if not isinstance(argument, Tensor):
        return repr(argument)
    kind = str(argument.dtype).removeprefix("torch.")
    where = "" if argument.device.type == "cpu" else f" {argument.device.type}"
    return f"{kind}{list(argument.shape)}{'' if argument.is_sparse or argument.is_contiguous() else argument.stride()}{where}"


def one(number: int) -> str | None:
    """Make a call; returns what is wrong with how it ended, if anything."""
    chance = random.Random(number)
    torch.manual_seed(number)
    name, op, arguments = chance.choice([linear_call, linear_call, block_call, block_call, stored_call])(chance)
    wrong = chance.choice([0, 1, 1, 1, 2])
    for _ in range(wrong):
        at = chance.randrange(len(arguments))
        arguments[at] = spoil(chance, arguments[at])
    print(number, f"{name}({', '.join(map(shown, arguments))})", flush=True)
    with Guard() as guard, torch.no_grad():
        try:
            op(*guarded(guard, chance, arguments))
        except TOLD as error:
            return f"{type(error).__name__}: {error}" if not wrong else None
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None


def main(first: int, count: int) -> int:
    faults = {}
    isas = library.supported_isas()
    for number in range(first, first + count):
        os.environ[library.ISA_ENVIRONMENT] = isas[number % len(isas)]
        library.isa.cache_clear()
        torch.set_num_threads(2 if number % 16 == 0 else 1)  # where processors are few and busy, two wait for each other
        if fault := one(number):
            faults[number] = fault
            print(f"  {number}: {fault}", flush=True)
    print(f"{count} calls, {len(faults)} faults", flush=True)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
