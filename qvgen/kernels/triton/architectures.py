"""NVIDIA GPUs by compute capability: what runs the products of packed layers there, and why.

Shared memory per block: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
"""

from __future__ import annotations

from typing import NamedTuple

OLDEST = (8, 0)


class Architecture(NamedTuple):
    capability: tuple[int, int]
    cards: str
    shared_bytes: int  # that a block can have
    instruction: str  # of products, in PTX
    why: str
    e4m3: bool = False  # codes up to 4 bits are multiplied as 8-bit floats

    @property
    def name(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"


_NATIVE_INT4 = "int8 products; int4 instructions exist here and are not used yet"
_NO_INT4 = "int8 products: int4 instructions are emulated here"
_KB = 1024
ARCHITECTURES = (
    Architecture((8, 0), "A100, A30", 163 * _KB, "mma.sync s8", _NATIVE_INT4),
    Architecture((8, 6), "RTX 3090, A10, A40, RTX A6000", 99 * _KB, "mma.sync s8", _NATIVE_INT4),
    Architecture((8, 9), "RTX 4090, L4, L40S", 99 * _KB, "mma.sync s8", _NATIVE_INT4),
    Architecture((9, 0), "H100, H200, GH200", 227 * _KB, "wgmma s8", _NO_INT4),
    Architecture(
        (10, 0), "B200, GB200", 227 * _KB, "mma.sync s8", f"{_NO_INT4}; Triton 3.7 has no tcgen05 for int8: below the peak"
    ),
    Architecture(
        (10, 3), "B300, GB300", 227 * _KB, "tcgen05 kind::f8f6f4",
        "int8 is slow by design; e4m3 holds codes up to 4 bits, and float32 their sums, exactly; wider codes run in int8",
        e4m3=True,
    ),
    Architecture((12, 0), "RTX 5090, RTX PRO 6000", 99 * _KB, "mma.sync s8", _NO_INT4),
)  # fmt: skip


def of(capability: tuple[int, int]) -> Architecture | None:
    """The entry of a card, or of the nearest older one of its generation; None for what is not supported."""
    if capability < OLDEST:
        return None
    older = [entry for entry in ARCHITECTURES if entry.capability <= capability and entry.capability[0] == capability[0]]
    # 8.7 (Orin) runs code of 8.6, 12.1 that of 12.0; 11.x and later generations have no entry.
    return older[-1] if older else None
