"""Latency and memory of several variants of one model, measured so that they can be compared.

Latencies are interleaved (A B C A B C ...), so that a machine that slows down or speeds up hits all variants alike, and
reported as medians with quartiles. The CPU time is taken beside the wall time: it does not count the time in which other
processes had the core, but it adds up the threads, which wait for each other in busy loops. Peak memory is measured in a
fresh process per variant: within one process the first variant would leave its high-water mark to the others.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qvgen.checkpoint.pipeline import ENCODERS, load_pipeline
from qvgen.models.files import DENOISERS

_WARM_UP = 2  # calls of each variant that are not counted


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and quartiles of `repetitions` calls."""

    median: float
    lower_quartile: float
    upper_quartile: float
    repetitions: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Samples:
    """Seconds per call of each round, in the order of the rounds; `cpu` is the CPU time of all threads of the process."""

    wall: list[float]
    cpu: list[float]


def time_calls(
    actions: Mapping[str, Callable[[], object]],
    repetitions: int,
    *,
    warm_up: int = _WARM_UP,
    least_seconds: float = 0.0,
    on_round: Callable[[int], object] = lambda _rounds: None,
) -> dict[str, Samples]:
    """Time each action in `repetitions` rounds, taking turns. `on_round(1)` is called after each round, warm-up too.

    An action that took less than `least_seconds` in the warm-up is called several times in its turn, so that the cost and
    resolution of the clock do not matter.
    """
    calls = dict.fromkeys(actions, 1)
    samples = {name: Samples([], []) for name in actions}
    for round_ in range(warm_up + repetitions):
        for name, action in actions.items():
            wall, cpu = time.perf_counter_ns(), time.process_time_ns()
            for _ in range(calls[name]):
                action()
            cpu, wall = time.process_time_ns() - cpu, time.perf_counter_ns() - wall
            if round_ >= warm_up:
                samples[name].wall.append(1e-9 * wall / calls[name])
                samples[name].cpu.append(1e-9 * cpu / calls[name])
            elif least_seconds:
                calls[name] = math.ceil(max(1, least_seconds * 1e9 * calls[name] / wall))
        on_round(1)
    return samples


def interleaved(
    actions: Mapping[str, Callable[[], object]],
    repetitions: int,
    *,
    warm_up: int = _WARM_UP,
    on_round: Callable[[int], object] = lambda _rounds: None,
) -> dict[str, Timing]:
    """Latency of each action: `time_calls` in wall time, summarized."""
    if repetitions < 2:
        raise ValueError(f"quartiles need at least 2 repetitions, got {repetitions}")
    samples = time_calls(actions, repetitions, warm_up=warm_up, on_round=on_round)
    return {name: timing(values.wall) for name, values in samples.items()}


def timing(seconds: Sequence[float]) -> Timing:
    """Summary of at least 2 measurements."""
    lower, median, upper = quartiles(seconds)
    return Timing(median, lower, upper, len(seconds))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile of at least 2 values."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Run with `count` intra-op threads (None: leave as is) and restore."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_memory_mb(
    folder: str | Path,
    inputs: str | Path,
    dtype: str,
    threads: int | None = None,
    device: torch.device | str = "cpu",
    component: str = "transformer",
) -> dict[str, float]:
    """Peak resident memory in MB (10^6 bytes) of a fresh process that loads one transformer and takes one step.

    `folder`: a diffusers pipeline folder; `inputs`: a safetensors file with `latents`, `timestep`, `text` (and `image`);
    `dtype`: "float32" or "bfloat16"; `component`: which transformer of two. Returns {"peak", "imports", "loaded",
    "load_s"}: "imports" is the peak after the imports, before loading, which every variant pays alike; "loaded" that after
    loading, which took `load_s` seconds. Raises RuntimeError with the process's own words if it fails.
    """
    command = [
        sys.executable,
        "-m",
        "qvgen.evaluation.cost.memory",
        str(folder),
        str(inputs),
        dtype,
        str(threads or 0),
        str(device),
        component,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {folder} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def load_variant(folder: str | Path, dtype: str, device: torch.device | str | None = None, beside: Any = None) -> Any:
    """A pipeline whose transformers and text encoders are in `dtype` ("bfloat16", ...), packed layers excepted; the VAE
    stays float32. With a pipeline of another variant of the same model `beside`, VAE and text encoders of the same dtype are
    shared with it."""
    reduced, shared = getattr(torch, dtype), {}
    if beside is not None:
        shared["vae"] = beside.vae
        encoders = {name: getattr(beside, name, None) for name in ENCODERS}
        shared |= {name: model for name, model in encoders.items() if model is not None and model.dtype == reduced}
    dtypes = {**dict.fromkeys((*DENOISERS, *ENCODERS), reduced), "default": torch.float32}
    return load_pipeline(folder, dtypes, device, shared)
