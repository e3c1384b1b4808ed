"""`python -m bench.linear`: the packed linear layer against what PyTorch has for the same product (bench/variants.py).

For every number of threads, M (rows of the input) and shape K x N the variants are timed in turn, A B C A B C ..., after
two rounds of warm-up, each for at least 2 ms at a time. A speedup is the median over the rounds of the other's time over
ours; `quartiles` holds those of the same ratios.

`--device cuda`: the same against what PyTorch has there, in the GPU's own time, by its events around a turn's calls.

With one thread that time is CPU time, which leaves out when other processes had the core. With several it is wall time:
CPU time would add up threads that wait for the slowest in a busy loop, and count as a loss what is none.

At M = 1 a layer is read once per call, from memory when a model runs it, because the other layers came in between. There
every variant rotates over as many copies of its layer as together are twice the last-level cache (but no more than 1024,
so layers of a few kilobytes stay in it).

peak_fraction: multiply-accumulates M K N per cycle and core, over what the instruction in use can do, which is measured (or
--peak). It counts what the layer's definition asks for, whatever algorithm computes it, and all of its time, quantization
of the inputs included.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from tqdm import tqdm

from bench.gpu.timing import CLOCK, device_of, time_on
from bench.machine import cycles_per_second, last_level_cache, peak_macs_per_cycle
from bench.report import geometric_mean, print_table, write_json
from bench.variants import ON_GPUS, OURS, VARIANTS, Problem, Unavailable, packed_layer
from qvgen.evaluation.cost.hardware import describe, hardware
from qvgen.evaluation.cost.speed import quartiles, torch_threads
from qvgen.kernels.cpu import library

LEAST_SECONDS = 2e-3
COLD_CACHE = 2  # times the last-level cache
MOST_COPIES = 1024

Shape = tuple[int, int]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.linear", description="packed linear layer against PyTorch's")
    parser.add_argument("--device", type=device_of, default=torch.device("cpu"), help="cpu (the default) or cuda")
    parser.add_argument("--threads", type=_numbers, help="default 1,2; none on a GPU")
    parser.add_argument("--m", type=_numbers, default=[1, 64, 512, 1560], help="rows of the input; default 1,64,512,1560")
    parser.add_argument("--shapes", type=_shapes, default=_shapes("1536x1536,1536x8960,8960x1536"), help="KxN,...")
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--activation-bits", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=20, help="rounds that are counted")
    parser.add_argument("--isa", help=f"instruction set of the packed layer; as {library.ISA_ENVIRONMENT}")
    parser.add_argument("--peak", type=float, help="multiply-accumulates per cycle and core, if the machine's own is known")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args(arguments)
    if options.repetitions < 2:
        parser.error("quartiles need at least 2 repetitions")
    on_gpu = options.device.type != "cpu"
    if on_gpu and (options.threads or options.isa or options.peak):
        parser.error("--threads, --isa and --peak are for the CPU")
    if options.isa:
        os.environ[library.ISA_ENVIRONMENT] = options.isa
    try:
        peak = {"isa": None, "macs_per_cycle": None, "cycles_per_second": None} if on_gpu else peak_of(options.peak)
    except ValueError as error:
        parser.error(str(error))

    rows = []
    # Threads in ascending order: a pool that is there waits in busy loops for a while, which is CPU time.
    every = [torch.get_num_threads()] if on_gpu else options.threads or [1, 2]
    cases = [(t, m, shape) for t in sorted(every) for m in options.m for shape in options.shapes]
    for threads, m, (k, n) in tqdm(cases, unit="row", disable=not sys.stderr.isatty()):
        with torch_threads(threads), torch.no_grad():
            problem = Problem.random(m, k, n, options.weight_bits, options.activation_bits, options.device)
            rows.append(measure(problem, threads, options.repetitions, peak))
    content = {
        "rows": rows,
        "geometric_mean": {str(t): geometric_means([r for r in rows if r["threads"] == t]) for t in every},
        "device": hardware(),
        "repetitions": options.repetitions,
    } | peak
    show(content)
    if options.json:
        write_json(options.json, content)


def peak_of(given: float | None) -> dict[str, Any]:
    """The instruction set, its peak and the clock rate; None for each where there are no compiled kernels."""
    try:
        isa, cycles = library.isa().decode(), cycles_per_second()
    except library.LibraryMissing:
        return {"isa": None, "macs_per_cycle": given, "cycles_per_second": None}
    return {"isa": isa, "macs_per_cycle": given or peak_macs_per_cycle(isa), "cycles_per_second": cycles}


def measure(problem: Problem, threads: int, repetitions: int, peak: dict[str, Any]) -> dict[str, Any]:
    """One row, with torch's threads already set."""
    (m, k), n = problem.x.shape, len(problem.weight)
    actions = {name: action for name in variants_of(problem) if (action := build(name, problem, threads)) is not None}
    device = problem.x.device
    samples = time_on(device, actions, repetitions, LEAST_SECONDS)
    clock = CLOCK if device.type != "cpu" else "cpu" if threads == 1 else "wall"
    rounds = {
        name: [1e3 * s for s in getattr(values, "wall" if clock == CLOCK else clock)] for name, values in samples.items()
    }
    ratios = {
        name: quartiles([other / ours for other, ours in zip(values, rounds[OURS], strict=True)])
        for name, values in rounds.items()
        if name != OURS
    }
    ms = {name: quartiles(values)[1] for name, values in rounds.items()}
    backend = packed_layer(problem)().backend
    fraction = None
    if backend == "cpu" and peak["macs_per_cycle"] and peak["cycles_per_second"]:
        fraction = m * k * n / (1e-3 * ms[OURS] * peak["cycles_per_second"] * peak["macs_per_cycle"] * threads)
    return {
        "m": m,
        "k": k,
        "n": n,
        "weight_bits": problem.weight_bits,
        "activation_bits": problem.activation_bits,
        "threads": threads,
        "backend": backend,
        "speedup": {name: median for name, (_, median, _) in ratios.items()},
        "quartiles": {name: [lower, upper] for name, (lower, _, upper) in ratios.items()},
        "peak_fraction": fraction,
        "clock": clock,
        "ms": ms,
        "rounds_ms": rounds,
        "wall_ms": {name: 1e3 * quartiles(values.wall)[1] for name, values in samples.items()},
    }


_reported: set[str] = set()


def variants_of(problem: Problem) -> dict[str, Any]:
    return VARIANTS if problem.x.device.type == "cpu" else ON_GPUS


def build(name: str, problem: Problem, threads: int) -> Callable[[], object] | None:
    """A variant's action, rotating over copies of the layer where M = 1. None, with the reason printed once, without one."""
    make_variant, bits = variants_of(problem)[name]
    try:
        make = make_variant(problem)
    except Unavailable as reason:
        message = f"no {name}: {reason}"
        if message not in _reported:
            _reported.add(message)
            print(message, file=sys.stderr)
        return None
    if len(problem.x) > 1:
        return make()
    size = problem.weight.numel() * (bits or problem.weight_bits) / 8
    count = min(MOST_COPIES, math.ceil(COLD_CACHE * _cache(problem, threads) / size))
    copies = cycle([make() for _ in range(count)])
    return lambda: next(copies)()


def _cache(problem: Problem, threads: int) -> int:
    if problem.x.is_cuda:
        return torch.cuda.get_device_properties(problem.x.device).L2_cache_size
    return last_level_cache(threads)


def geometric_means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of each speedup over the rows that have it."""
    return {name: geometric_mean(row["speedup"][name] for row in rows if name in row["speedup"]) for name in others_in(rows)}


def others_in(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["speedup"]))


def show(content: dict[str, Any]) -> None:
    others = others_in(content["rows"])
    for threads, means in content["geometric_mean"].items():
        rows = [row for row in content["rows"] if str(row["threads"]) == threads]
        cells = [
            [
                f"{row['m']} x {row['k']} x {row['n']}",
                f"{row['ms'][OURS]:.3f}",
                "–" if row["peak_fraction"] is None else f"{row['peak_fraction']:.1%}",
                *[f"{row['speedup'][name]:.2f}" if name in row["speedup"] else "–" for name in others],
            ]
            for row in rows
        ]
        cells.append(["geometric mean", "", "", *[f"{means[name]:.2f}" if name in means else "–" for name in others]])
        title = (
            f"W{rows[0]['weight_bits']}A{rows[0]['activation_bits']}, threads {threads}: speedup over, {rows[0]['clock']} time"
        )
        print_table(title, ["M x K x N", "ms", "of peak", *others], cells)
    print(f"{describe(content['device'])}; kernels {rows_backend(content)}, {content['isa']}")


def rows_backend(content: dict[str, Any]) -> str:
    return "+".join(sorted({row["backend"] for row in content["rows"]}))


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _shapes(text: str) -> list[Shape]:
    shapes = []
    for part in text.split(","):
        k, _, n = part.partition("x")
        shapes.append((_positive(k), _positive(n)))
    return shapes


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


if __name__ == "__main__":
    main()
