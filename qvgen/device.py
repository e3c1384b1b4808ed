"""The device that stages compute on: `compute.device` of params.yaml, or the variable QVGEN_DEVICE, which overrides it; and
its memory.

Random numbers are drawn on the CPU whatever the device, so that every device trains on the same clips, noise and timesteps.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PATTERN = r"^(auto|cpu|cuda(:\d+)?|mps)$"  # of a device's name; params.yaml is read with it, so torch is not imported here
VARIABLE = "QVGEN_DEVICE"
# In what PyTorch and NumPy say of a lack of memory.
_WANTED = re.compile(r"(?:tried|unable) to allocate (\d+(?:\.\d+)?) ?(bytes|[KMGTP]i?B)", re.IGNORECASE)
_FREE = re.compile(r"GPU (\d+) has a total capacity of (\S+ \S+) of which (\S+ \S+) is free")


def resolve_device(wanted: str = "auto") -> torch.device:
    """The device named `wanted`, or by QVGEN_DEVICE if that is set. `auto`: the first CUDA device if there is one, else the
    CPU; of several processes on a host each has its own (LOCAL_RANK, as torchrun sets it). mps is used where it is named,
    because it lacks float64.

    Raises ValueError for another name, and for a device that this machine or this build of torch does not have.
    """
    import torch

    given = os.environ.get(VARIABLE) or wanted
    origin = f"{VARIABLE}={given}" if os.environ.get(VARIABLE) else f"compute.device = {given!r}"
    if not re.fullmatch(PATTERN, given):
        raise ValueError(f"{origin} is no device; choose auto, cpu, cuda, cuda:N or mps")
    if given == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        local = os.environ.get("LOCAL_RANK", "")
        return torch.device("cuda", int(local) % torch.cuda.device_count() if local.isdigit() else torch.cuda.current_device())
    device = torch.device(given)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = device.index if device.index is not None else 0
        if index >= count:
            raise ValueError(
                f"{origin}: torch {torch.__version__} sees {count} CUDA devices here; choose cpu, a number below {count}, "
                "or install the build of torch for this card"
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"{origin}: torch {torch.__version__} has no MPS device here; choose cpu or auto")
    return device


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done what it was given: a clock read before that measures launches, not work."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def release_memory(device: torch.device, in_cycles: bool = True) -> None:
    """Give memory that is no longer used back, after a model was dropped and before the next is loaded. `in_cycles`: look for
    what only refers to itself, which takes a third of a second."""
    import gc

    import torch

    if in_cycles:
        gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on MPS, which has nothing wider."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def peak_resident_mb() -> float:
    """Peak resident memory of this process in MB.

    Linux: VmHWM, because ru_maxrss there also counts the parent that started us, from before the exec.
    """
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


def lack_of_memory(error: BaseException) -> str | None:
    """Of an error that is a lack of memory: where, how much more was wanted and how much was free, as far as it says; None
    of other errors."""
    text = str(error)
    lacking = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not lacking and not (isinstance(error, RuntimeError) and re.search("can't allocate memory|out of memory", text)):
        return None
    wanted, free = _WANTED.search(text), _FREE.search(text)
    amount = "more was wanted than there is"
    if wanted:
        number, unit = wanted.groups()
        amount = f"{float(number) / 1e9:.2f} GB" if unit == "bytes" else f"{number} {unit}"
        amount += " more were wanted"
    if free:
        return f"out of memory on GPU {free[1]}: {amount}, {free[3]} of {free[2]} were free"
    on_cpu = isinstance(error, MemoryError) or "CPUAllocator" in text
    return f"out of memory on {'the CPU' if on_cpu else 'the GPU'}: {amount}"
