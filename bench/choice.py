"""`python -m bench.choice`: whether the kernels that `auto` takes on this machine are the fastest at other sizes too.

`auto` decides by one linear layer, one attention and one weight-only layer (qvgen/kernels/cpu/choice.py). Here every
instruction set runs layers of other sizes, attention runs at other lengths, and so on, measured as there. Ends with status 1
if the one chosen is anywhere slower than another by more than noise.
"""

from __future__ import annotations

import argparse
import sys

import torch

from bench.report import print_table
from qvgen.kernels.cpu import choice, library

LAYERS = [(m, k, n) for m in (1, 64, 512, 1560) for k, n in ((1536, 1536), (1536, 8960), (8960, 1536))]
QUERIES = (128, 512, 1560)
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


if __name__ == "__main__":
    sys.exit(main())
