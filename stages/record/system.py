"""The use of CPU, memory and accelerators while a stage runs, under the names that MLflow shows as system metrics."""

from __future__ import annotations

import itertools
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.record.journal import Journal

SAMPLE_SECONDS = 10.0  # at most; in the beginning more often, so that short stages have some too
MB = 1e6


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
