"""The use of CPU, memory and accelerators while a stage runs, under the names that MLflow shows as system metrics; and the
processor and the number of threads, on which the bytes of its outputs depend."""

from __future__ import annotations

import itertools
import os
import platform
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.record.journal import Journal

SAMPLE_SECONDS = 10.0  # at most; in the beginning more often, so that short stages have some too
MB = 1e6
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


class SystemMonitor:
    """A thread that writes samples of this process and the machine into the journal until it is stopped or the journal ends.

    It samples here, not where MLflow is, so that nothing is lost while tracking is down. Percentages of the process are of
    one core, those of the machine of all.
    """

    def __init__(self, journal: Journal) -> None:
        import psutil

        self._journal, self._process, self._stopped = journal, psutil.Process(), threading.Event()
        psutil.cpu_percent()  # both count from the call before
        self._process.cpu_percent()
        threading.Thread(target=self._sample, name="system metrics", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _sample(self) -> None:
        for step in itertools.count():
            if self._stopped.wait(min(2.0**step, SAMPLE_SECONDS)):
                return
            values = {f"system/{name}": value for name, value in self._read().items()}
            self._journal.write("metrics", step=step, values=values)

    def _read(self) -> dict[str, float]:
        import psutil

        memory = psutil.virtual_memory()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MB,
            "system_memory_usage_percentage": memory.percent,
            "process_cpu_percentage": self._process.cpu_percent(),
            "process_memory_megabytes": self._process.memory_info().rss / MB,
        }
        cuda = sys.modules.get("torch.cuda")  # a stage that has no use for it shall not wait for its import
        if cuda is not None and hasattr(cuda, "mem_get_info") and cuda.is_initialized():  # not half imported
            for i in range(cuda.device_count()):
                free, total = cuda.mem_get_info(i)
                values[f"gpu_{i}_memory_usage_megabytes"] = (total - free) / MB
        return values
