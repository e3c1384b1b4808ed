"""Time on a device: that of a GPU by its own events, which leave out what the host does meanwhile."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping

import torch

from qvgen.evaluation.cost.speed import Samples, time_calls

CLOCK = "gpu"
WARM_UP = 2
MOST_CALLS = 1000  # in a turn


def device_of(text: str) -> torch.device:
    """Of an option. Raises argparse.ArgumentTypeError for one that cannot be used here."""
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; give cpu or cuda") from None
    if device.type == "cuda":
        from qvgen.kernels.triton.backend import refusal

        if reason := refusal():
            raise argparse.ArgumentTypeError(f"{text} cannot be used: {reason}")
    elif device.type != "cpu":
        raise argparse.ArgumentTypeError(f"{text} is not measured; give cpu or cuda")
    return device


def time_on(
    device: torch.device, actions: Mapping[str, Callable[[], object]], repetitions: int, least_seconds: float = 0.0
) -> dict[str, Samples]:
    """As speed.time_calls, which it is on a CPU. On a GPU both times are the GPU's, and a turn ends when its work is done."""
    if device.type == "cpu":
        return time_calls(actions, repetitions, least_seconds=least_seconds)
    calls, samples = dict.fromkeys(actions, 1), {name: Samples([], []) for name in actions}
    for round_ in range(WARM_UP + repetitions):
        for name, action in actions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            start.record()
            for _ in range(calls[name]):
                action()
            end.record()
            torch.cuda.synchronize(device)
            seconds = 1e-3 * start.elapsed_time(end)
            if round_ >= WARM_UP:
                samples[name].wall.append(seconds / calls[name])
                samples[name].cpu.append(seconds / calls[name])
            elif least_seconds:
                each = seconds / calls[name]
                calls[name] = min(MOST_CALLS, math.ceil(max(1, least_seconds / max(each, 1e-9))))
    return samples


def rounds_within(seconds: float, of_one_round: float, fewest: int = 2, most: int = 10) -> int:
    """How many rounds, warm-up apart, fit a time."""
    return max(fewest, min(most, int(seconds / max(of_one_round, 1e-9)) - WARM_UP))
