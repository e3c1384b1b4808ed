"""The processor and the number of threads, on which the bytes of a stage's outputs depend."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

THREADS, PROCESSOR, INSTRUCTIONS = "machine.threads", "machine.processor", "machine.instructions"  # tags of a run
# What PyTorch, oneDNN, MKL and the project's kernels choose their code by, as /proc/cpuinfo names it ...
_CHOSEN_BY = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "sve",
)
# ... and the variables that let them choose otherwise.
_VARIABLES = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")


def computed_on() -> dict[str, str]:
    """Tags of a run that say what the bytes it computed depend on besides code, data and parameters: sums are made in another
    order by another number of threads, and by other instructions. Ask when the run is done: the number of threads is known
    where torch was loaded, and there only do bytes depend on it.
    """
    tags = {PROCESSOR: processor(), INSTRUCTIONS: instructions()}
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):  # not half imported
        tags[THREADS] = str(torch.get_num_threads())
    return tags


def processor() -> str:
    """The model name that the system gives it."""
    names = {value for name, value in _cpuinfo() if name == "model name"}
    return ", ".join(sorted(names)) or platform.processor() or platform.machine()


def instructions() -> str:
    """Those of its instruction sets that kernels are chosen by, and the variables that are set and change the choice."""
    flags = {flag for name, value in _cpuinfo() if name in ("flags", "Features") for flag in value.split()}
    found = [name for name in _CHOSEN_BY if name in flags]
    found += [f"{name}={os.environ[name]}" for name in _VARIABLES if os.environ.get(name)]
    return " ".join(found) or platform.machine()


def _cpuinfo() -> list[tuple[str, str]]:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    return []
