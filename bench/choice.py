"""`python -m bench.choice`: whether the kernels that `auto` takes on this machine are the fastest at other sizes too.

`auto` decides by one linear layer, one attention and one weight-only layer (qvgen/kernels/cpu/choice.py), and takes attention
of short sequences from a kernel of its own without measuring. Here every instruction set runs layers of other sizes, attention
runs at other lengths, and so on, measured as there. Ends with status 1 if the one chosen is anywhere slower than another by
more than noise.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch

from bench.report import print_table
from qvgen.evaluation.cost.speed import time_calls, torch_threads
from qvgen.kernels import expressions
from qvgen.kernels.cpu import block_functions, choice, library

LAYERS = [(m, k, n) for m in (1, 64, 512, 1560) for k, n in ((1536, 1536), (1536, 8960), (8960, 1536))]
QUERIES = (128, 512, 1560)
SHORT = [(48, 48, 4, 32), (48, 12, 4, 32), (200, 200, 12, 64), (1560, 512, 12, 128)]  # queries, keys, heads, features
SHORT_IN_BFLOAT16 = [(48, 48, 4, 32), (60, 9, 12, 128), (48, 48, 12, 128), (128, 32, 12, 128), (64, 64, 12, 128)]
NOISE = 1.1  # times as slow counts as equal


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.choice", description="whether auto takes the fastest kernels")
    parser.add_argument("--smallest", action="store_true", help="one small layer and one short attention only")
    options = parser.parse_args(arguments)
    chosen = choice.choice()
    names = [name for name in library.supported_isas() if name in chosen.linear_ms]
    rows = [
        (f"linear {m} x {k} x {n}", chosen.isa, choice.measure_linear(names, m, k, n))
        for m, k, n in (LAYERS[:1] if options.smallest else LAYERS)
    ]
    if chosen.attention_ms:
        kernels = [name for name in chosen.attention_ms if name != choice.PYTORCH]
        with torch.no_grad():
            lengths = QUERIES[:1] if options.smallest else QUERIES
            rows += [(f"attention {q}", chosen.attention, choice.measure_attention(kernels, q)) for q in lengths]
    for dtype, shapes in ((torch.float32, SHORT), (torch.bfloat16, SHORT_IN_BFLOAT16)):
        for shape in shapes[:1] if options.smallest else shapes:
            rows.append((f"attention {' x '.join(map(str, shape))}, {dtype}", *measure_short(*shape, dtype)))
    ours = "cpu" if chosen.compiled_weight_only else choice.PYTORCH
    rows += [
        (f"weight-only {m} x {k} x {n}", ours, choice.measure_weight_only(chosen.isa, m, k, n))
        for m, k, n in (LAYERS[:1] if options.smallest else LAYERS)
    ]
    lost = [what for what, name, ms in rows if ms[name] > NOISE * min(ms.values())]
    cells = []
    for what, name, ms in rows:
        fastest = min(ms, key=ms.__getitem__)
        slower = "slower" if what in lost else ""
        cells.append([what, name, f"{ms[name]:.3f}", f"{fastest} {ms[fastest]:.3f}", slower])
    print_table("kernels that auto takes, and the fastest", ["what", "auto takes", "ms", "fastest, ms", ""], cells)
    return 1 if lost else 0


def measure_short(queries: int, keys: int, heads: int, features: int, dtype: torch.dtype) -> tuple[str, dict[str, float]]:
    """The one that `auto` takes, and milliseconds of CPU time of one attention: by the kernel for short sequences, by the
    other compiled one where it is to be had, and by PyTorch."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, heads, features, generator=generator).to(dtype) for tokens in (queries, keys, keys))
    actions = {
        "short": partial(block_functions.short_attention, q, k, v),
        choice.PYTORCH: partial(expressions.attention, q, k, v),
    }
    other = block_functions.attention_kernel() if dtype == torch.bfloat16 else ""
    if other:
        actions[other] = partial(block_functions.attention, q, k, v, other)
    with torch.no_grad(), torch_threads(1):
        samples = time_calls(actions, repetitions=50, warm_up=5)
    taken = "short" if block_functions.is_short(dtype, queries, keys, features) else other or choice.PYTORCH
    return taken, {name: 1e3 * min(times.cpu) for name, times in samples.items()}


if __name__ == "__main__":
    sys.exit(main())
