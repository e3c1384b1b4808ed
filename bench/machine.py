"""What the numbers are measured against: the caches and the instruction peak of this machine."""

from __future__ import annotations

from pathlib import Path

from qvgen.kernels.cpu import library

_DEFAULT_CACHE = 32 * 2**20


def peak_macs_per_cycle(isa: str) -> float | None:
    """Multiply-accumulates of one core, by measurement of the instruction that the kernels of `isa` are made of. Processors
    differ: 512-bit vpdpbusd is 64 at a time, two times per cycle on Zen 5, once on Zen 4. None if the library cannot tell."""
    return library.load().qvgen_peak(isa.encode()) or None


def cycles_per_second() -> float:
    return library.load().qvgen_cycles_per_second()


def last_level_cache(threads: int) -> int:
    """Bytes of the largest caches that `threads` threads can spread over. 32 MiB where the system does not say."""
    caches: dict[tuple[str, str], int] = {}
    for cache in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, shared, size = (cache.joinpath(f).read_text().strip() for f in ("level", "shared_cpu_list", "size"))
        except OSError:
            continue
        caches[level, shared] = int(size.removesuffix("K")) * 1024
    if not caches:
        return _DEFAULT_CACHE
    last = max(level for level, _ in caches)
    return sum(sorted((size for (level, _), size in caches.items() if level == last), reverse=True)[:threads])
