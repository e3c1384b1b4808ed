"""`python -m bench.roofline`: what each op of a denoising step must move and compute, and the time that takes at a card's
peaks. A model, not a measurement: no kernel reaches all of it, and launches, caches and tails are left out.

Per op: bytes read and written in GPU memory once each, 2 operations per multiply-add, time = the larger of bytes / bandwidth
and operations / peak. Packed linears read x in bfloat16 and write codes, read codes and packed weights (for many tokens the
weight is unpacked to bytes once, written and read) and write bfloat16. In Wan's blocks norms are part of what makes codes of
their result, gates and residuals part of the products before them (qvgen/kernels/fused_ops.py); the wide intermediate stays in
the L2 cache where its tokens are taken by blocks (configurations.tokens_together). Peaks are dense, each with its source in
CARDS; where not all of them could be confirmed, the output says so.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from bench.report import print_table
from qvgen.kernels.triton.configurations import SCRATCH_FROM, tokens_together

TEXT_TOKENS = {"wan": 512, "cogvideox": 226}


class Card(NamedTuple):
    gigabytes_per_s: float
    bf16_tflops: float  # float32 accumulation, dense
    int8_tops: float  # dense; of what runs products of codes there
    cache_megabytes: int  # L2; on a GPU the launch asks the card itself
    source: str
    confirmed: bool = True


# NVIDIA's own documents could not be read when these were checked (2026-11-27); the pages named here give the same numbers, or
# say what they would be. What no page gave is marked and printed as such. L2: A100, H100 (centeringsection.com), RTX 3090
# (6,144 KB), 4090 and 5090 (herosweb.com), L40 (hmc-tech.com); of B200 the half of what others say, 65.5 MB (hmc-tech.com).
CARDS = {
    "a100": Card(2039, 312, 624, 40, "80 GB SXM; glennklockwood.com/garden/processors/A100, which cites NVIDIA's data sheet"),
    "rtx3090": Card(936, 71, 284, 6, "936 GB/s and 71 in bf16: half of 142 in fp16 (Tom's Hardware); int8 is four times that",
                    confirmed=False),
    "rtx4090": Card(1008, 165.2, 660.6, 72, "waredb.com/processor/nvidia-geforce-rtx-4090, gigagpu.com"),
    "l40s": Card(864, 362, 733, 96, "366 and 733 by hmc-tech.com at its boost; bandwidth from memory", confirmed=False),
    "h100": Card(3350, 989.4, 1978.9, 50, "SXM; glennklockwood.com/garden/processors/h100"),
    "h200": Card(4800, 989.4, 1978.9, 50, "products as H100 (the same page); the bandwidth is from memory", confirmed=False),
    "b200": Card(8000, 2250, 4500, 65, "HGX, 1,000 W; glennklockwood.com/garden/processors/B200; pages differ on its L2",
                 confirmed=False),
    "rtx5090": Card(1792, 209.5, 838, 96, "1,792 GB/s (spheron.network); int8: a quarter of 3,352 (castromedia.org); "
                    "bf16: a quarter of int8, as on the RTX 4090", confirmed=False),
}  # fmt: skip


class Model(NamedTuple):
    family: str
    layers: int
    width: int
    heads: int
    feed_forward: int
    joint: bool  # text tokens go through the same layers (CogVideoX); else cross-attention (Wan)


MODELS = {
    "wan2.1-1.3b": Model("wan", 30, 1536, 12, 8960, False),
    "wan2.1-14b": Model("wan", 40, 5120, 40, 13824, False),
    "cogvideox-2b": Model("cogvideox", 30, 1920, 30, 7680, True),
}


class Op(NamedTuple):
    name: str
    calls: int  # in a step
    bytes: float  # of one call
    operations: float
    integer: float  # share of its operations that are products of codes


def tokens(frames: int) -> int:
    """Of a video of 480 x 832 pixels: an eighth in space, a quarter in time after the first frame, patches of 2 x 2."""
    return ((frames - 1) // 4 + 1) * (480 // 16) * (832 // 16)


def linear(m: int, k: int, n: int, weight_bits: int) -> tuple[float, float]:
    """Bytes and operations of a packed layer; the codes of x are counted apart (quantize)."""
    weight = n * k * weight_bits / 8
    scratch = 2 * n * k if m >= SCRATCH_FROM and weight_bits < 8 else 0
    return m * k + weight + scratch + 2 * m * n, 2.0 * m * k * n


def quantize(m: int, k: int, sets: int) -> float:
    """Bytes: x in bfloat16 once, a byte of code for every layer."""
    return m * k * (2 + sets)


def attention(name: str, calls: int, d: int, queries: int, keys: int, int8: bool) -> Op:
    """q, k, v and the result in bfloat16. `int8`: q is read and its codes written and read, as those of k, which is read once
    more for its mean; one of the two products is of codes. Exponentials are left out, as everywhere."""
    moved = 2.0 * (2 * queries + 2 * keys) + (2.0 * queries + 4.0 * keys if int8 else 0)
    name, products = f"{name} ({'q k in int8' if int8 else 'bf16'})", 4.0 * queries * keys * d
    return Op(name, calls, moved * d, products, 0.5 if int8 else 0.0)


def packed_step(
    model: Model, m: int, weight_bits: int, card: Card, fused: bool = True, int8_attention: bool = False
) -> list[Op]:
    """Every op of a step with packed linears; without embedders and head, which stay in bfloat16. `fused`: with
    kernels/fused_ops.py, which only Wan's blocks use. `int8_attention`: with QVGEN_ATTENTION=int8."""
    if model.joint:
        return _joint_step(model, m, weight_bits, int8_attention)
    return _wan_step(model, m, weight_bits, card, fused, int8_attention)


def _wan_step(model: Model, m: int, bits: int, card: Card, fused: bool, int8: bool) -> list[Op]:
    d, f, text, layers = model.width, model.feed_forward, TEXT_TOKENS[model.family], model.layers
    square, (wide_bytes, wide), narrow = linear(m, d, d, bits), linear(m, d, f, bits), linear(m, f, d, bits)
    norm, added = ("layer norm, ", ", residual") if fused else ("", "")
    residual = 2.0 * m * d if fused else 0.0  # read by the product; gates of a sample each are nothing
    together = fused and tokens_together(m, d, f, 2, card.cache_megabytes * 2**20) < m
    stays = 2.0 * m * f if together else 0.0  # written, and read, in the cache
    ops = [
        Op(f"{norm}quantize for q, k, v", layers, quantize(m, d, 3), 0, 0),
        Op(f"{norm}quantize for one layer", layers * 2, quantize(m, d, 1), 0, 0),
        Op("quantize what attention gives", layers * 2, quantize(m, d, 1), 0, 0),
        Op("quantize the wide intermediate", layers, quantize(m, f, 1) - stays, 0, 0),
        Op("linear d x d", layers * 4, *square, 1),
        Op(
            "linear d x d, residual" if fused else "linear d x d of attention",
            layers * 2,
            square[0] + residual,
            square[1],
            1,
        ),
        Op("linear d x f, GELU", layers, wide_bytes - stays, wide, 1),
        Op(f"linear f x d{added}", layers, narrow[0] + residual, narrow[1], 1),
        attention("self-attention", layers, d, m, m, int8),
        Op("rms_norm_rotary", layers * 2, 4.0 * m * d, 0, 0),
        Op("linear d x d of the text", layers * 2, *linear(text, d, d, bits), 1),
        attention("cross-attention", layers, d, m, text, int8),
    ]
    return ops if fused else ops + _between(model, m, 3)


def _joint_step(model: Model, m: int, bits: int, int8: bool) -> list[Op]:
    d, f, layers, rows = model.width, model.feed_forward, model.layers, m + TEXT_TOKENS[model.family]
    return [
        Op("quantize for q, k, v", layers, quantize(rows, d, 3), 0, 0),
        Op("quantize for one layer", layers * 2, quantize(rows, d, 1), 0, 0),
        Op("quantize the wide intermediate", layers, quantize(rows, f, 1), 0, 0),
        Op("linear d x d", layers * 4, *linear(rows, d, d, bits), 1),
        Op("linear d x f, GELU", layers, *linear(rows, d, f, bits), 1),
        Op("linear f x d", layers, *linear(rows, f, d, bits), 1),
        attention("self-attention", layers, d, rows, rows, int8),
        Op("rms_norm_rotary", layers * 2, 4.0 * rows * d, 0, 0),
        *_between(model, rows, 2),
    ]


def _between(model: Model, rows: int, of_each: int) -> list[Op]:
    """Norms, gates and residuals that are ops of their own."""
    d, layers = model.width, model.layers
    return [
        Op("layer_norm_modulate", layers * of_each, 4.0 * rows * d, 0, 0),
        Op("add_gated", layers * of_each, 6.0 * rows * d, 0, 0),
    ]


def milliseconds(op: Op, card: Card) -> tuple[float, str]:
    """Of all its calls in a step, and what bounds it."""
    memory = op.bytes / (card.gigabytes_per_s * 1e9)
    compute = op.operations * (op.integer / card.int8_tops + (1 - op.integer) / card.bf16_tflops) / 1e12
    return 1e3 * op.calls * max(memory, compute), "memory" if memory > compute else "compute"


def bf16_milliseconds(model: Model, m: int, card: Card) -> float:
    """A step of the full-precision model: the ops one by one, bfloat16 products, and no quantization."""
    ops = packed_step(model, m, 4, card, fused=False)
    return sum(milliseconds(op._replace(integer=0), card)[0] for op in ops if not op.name.startswith("quantize"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description="a step's lower bound on a card; a model")
    parser.add_argument("--card", choices=list(CARDS), default="h100")
    parser.add_argument("--model", choices=list(MODELS), action="append", help="default: all")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--weight-bits", type=int, choices=range(2, 9), default=4)
    options = parser.parse_args(arguments)
    if options.frames < 1 or (options.frames - 1) % 4:
        parser.error(f"frames must be 4 n + 1, not {options.frames}")
    card, m = CARDS[options.card], tokens(options.frames)
    for name in options.model or MODELS:
        show(name, m, options.weight_bits, card, f"{options.frames} frames, {m} tokens")
    print(
        f"{options.card}: {card.gigabytes_per_s:.0f} GB/s, bf16 {card.bf16_tflops:.0f} TFLOPS, int8 {card.int8_tops:.0f} TOPS"
    )
    doubt = "" if card.confirmed else " Not all of these could be confirmed."
    print(f"({card.source}).{doubt} A model at peak rates, nothing here was measured.")


def show(name: str, m: int, weight_bits: int, card: Card, size: str) -> None:
    model = MODELS[name]
    ops, apart = (packed_step(model, m, weight_bits, card, fused) for fused in (True, False))
    times = [milliseconds(op, card) for op in ops]
    whole = sum(ms for ms, _ in times)
    cells = [
        [
            op.name,
            str(op.calls),
            f"{op.bytes / 1e6:.1f}",
            f"{op.operations / 1e9:.1f}",
            f"{ms:.2f}",
            f"{ms / whole:.1%}",
            bound,
        ]
        for op, (ms, bound) in zip(ops, times, strict=True)
    ]
    bf16, one_by_one = bf16_milliseconds(model, m, card), sum(milliseconds(op, card)[0] for op in apart)
    in_int8 = [(op, milliseconds(op, card)[0]) for op in packed_step(model, m, weight_bits, card, int8_attention=True)]
    cells.append(["a step", "", "", "", f"{whole:.1f}", "", f"bf16 {bf16:.1f} ms: at most {bf16 / whole:.2f}x"])
    cells.append(["the ops one by one", "", "", "", f"{one_by_one:.1f}", "", ""])
    for op, ms in in_int8:
        if "-attention" in op.name:
            cells.append([op.name, str(op.calls), f"{op.bytes / 1e6:.1f}", f"{op.operations / 1e9:.1f}", f"{ms:.2f}", "", ""])
    whole_int8 = sum(ms for _, ms in in_int8)
    cells.append(["a step with these", "", "", "", f"{whole_int8:.1f}", "", f"at most {bf16 / whole_int8:.2f}x"])
    header = ["op", "calls", "MB a call", "Gop a call", "ms a step", "share", "bound by"]
    print_table(f"{name}, {size}", header, cells)


if __name__ == "__main__":
    main()
