"""A lack of memory, in words."""

from __future__ import annotations

import re

_WANTED = re.compile(r"(?:tried|unable) to allocate (\d+(?:\.\d+)?) ?(bytes|[KMGTP]i?B)", re.IGNORECASE)
_FREE = re.compile(r"GPU (\d+) has a total capacity of (\S+ \S+) of which (\S+ \S+) is free")


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
