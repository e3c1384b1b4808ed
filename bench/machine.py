"""What the numbers are measured against: the caches and the instruction peak of this machine."""

from __future__ import annotations

from pathlib import Path

from qvgen.kernels.cpu import library

# Multiply-accumulates per cycle and core. vpdpbusd on 512 bits does 64: 128 holds for two such units (Intel server processors,
# Zen 5), and it is 64 on Zen 4, which takes two cycles for it. On 256 bits it does 32, in two units.
_PEAK = {"avx512vnni": 128.0, "avxvnni": 64.0}
_DEFAULT_CACHE = 32 * 2**20


def peak_macs_per_cycle(isa: str) -> float | None:
    """Of one core: measured where the library can, else from the table; None if neither knows the instruction set."""
    measure = getattr(library, "peak_macs_per_cycle", None)
    return (measure(isa) if measure is not None else None) or _PEAK.get(isa)


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
