"""Stage hardware: what of this machine decides a latency, in a small file that the benchmark depends on.

It runs at every `dvc repro`, so it imports nothing heavy and leaves no run behind.
"""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

OUTPUT = Path("artifacts/hardware.json")


def fingerprint() -> dict[str, object]:
    """The processor, its cores, memory in GiB, accelerators and the versions of Python and torch."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = None
    return {
        "processor": _processor(),
        "logical_cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "accelerators": sorted(_nvidia()),
        "python": platform.python_version(),
        "torch": torch,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return ", ".join(sorted(names)) or platform.processor() or platform.machine()


def _nvidia() -> list[str]:
    """Names of NVIDIA devices, from the driver: asking torch would take seconds."""
    cards = [card.read_text().splitlines() for card in Path("/proc/driver/nvidia/gpus").glob("*/information")]
    return [line.partition(":")[2].strip() for card in cards for line in card if line.startswith("Model")]


if __name__ == "__main__":
    content = json.dumps(fingerprint(), indent=2) + "\n"
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(content)
