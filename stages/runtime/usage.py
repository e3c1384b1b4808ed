"""What a stage used: device, peak of memory and throughput, a line at its end; and what to do where memory did not suffice."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from qvgen.device import lack_of_memory, peak_resident_mb, resolve_device

if TYPE_CHECKING:
    from qvgen.params import Params


class Bar(Protocol):
    """A finished progress bar."""

    counted: str  # what it counted: its description and its unit
    done: int
    seconds: float


TRAINING = "lower compute.micro_batch, set compute.checkpointing: true, qat.precision: bfloat16, or qat.optimizer: adamw8bit"
# Knobs that make a stage need less, the first to turn first.
KNOBS = {
    "prepare": "lower prepare.batch_size, or set prepare.vae_tiling: true",
    "calibrate": "lower calibrate.batch_size or calibrate.tokens_per_group",
    "baselines": "lower evaluate.batch_size, or set prepare.vae_tiling: true",
    "qat": TRAINING,
    "decay": TRAINING,
    "pack": "it needs the transformer in float32: end other processes, or use a machine with more memory",
    "evaluate": "lower evaluate.batch_size, or set prepare.vae_tiling: true",
    "benchmark": "lower benchmark.batch_size",
}


def summary(name: str, params: Params, bars: Sequence[Bar]) -> str:
    """`qat: cpu, peak 812 MB resident, 150 steps in 31.2 s (4.81 a second)`."""
    parts = [_device(params), f"peak {peak_resident_mb():.0f} MB resident"]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        parts.append(f"{torch.cuda.max_memory_allocated() / 1e6:.0f} MB on the device")
    for bar in bars:
        if bar.done and bar.seconds > 0:
            rate = bar.done / bar.seconds
            parts.append(f"{_count(bar.done)} {bar.counted} in {bar.seconds:.1f} s ({_count(rate)} a second)")
    return f"{name}: {', '.join(part for part in parts if part)}"


def out_of_memory(error: BaseException, name: str) -> str | None:
    """Of an error that is a lack of memory: how much was wanted, on what, and which knob to turn. None for other errors."""
    lacking = lack_of_memory(error)
    if lacking is None:
        return None
    knob = KNOBS.get(name.partition("@")[0], "use a machine with more memory")
    return f"{name}: {lacking}; {peak_resident_mb():.0f} MB were resident at most. To need less, {knob}"


def _device(params: Params) -> str:
    """Empty for a stage that computes nothing."""
    if "torch" not in sys.modules:
        return ""
    try:
        return str(resolve_device(params.compute.device))
    except ValueError:
        return ""


def _count(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"
