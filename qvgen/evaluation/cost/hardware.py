"""The machine on which a speed was measured. Without it a number means nothing on another machine."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

# CPU features that choose between kernels, as Linux and macOS spell them.
_ISA = ("neon", "asimd", "avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


def hardware() -> dict[str, Any]:
    """CPU model, cores, instruction sets, memory, operating system, torch version and threads, accelerator if any."""
    import psutil
    import torch

    flags = _cpu_flags()
    return {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "logical_cores": psutil.cpu_count(),
        "isa": [name for name in _ISA if name in flags],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def describe(facts: dict[str, Any]) -> str:
    """One line for a table: the device of `hardware()`."""
    isa = " ".join(facts["isa"]) or "no vector extensions known"
    return f"{facts['cpu']}, {facts['logical_cores']} cores, {facts['threads']} threads, {isa}, torch {facts['torch']}"


def kernel_name(transformer: Any) -> str:
    """The backend that the packed layers ran in (several, joined by "+", where layers differ), with its instruction set."""
    from qvgen.kernels.cpu import library
    from qvgen.nn.packed_linear import packed_layers

    names = sorted({str(layer.backend) for _, layer in packed_layers(transformer)})
    return "+".join(f"cpu ({library.isa().decode()})" if name == "cpu" else name for name in names)


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    return set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())


def _cpuinfo(key: str) -> str | None:
    """First value of `key` in /proc/cpuinfo; None where there is no such file or key."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), None)
