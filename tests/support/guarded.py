"""Tensors that end, or begin, at a page that nobody may touch: who reads or writes beyond them ends the process."""

from __future__ import annotations

import ctypes
import mmap

import torch

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value


class Guard:
    """Context manager that copies tensors into guarded memory, which is given back at the end: none may be used after it."""

    def __init__(self) -> None:
        self._maps: list[tuple[int, int]] = []

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_: object) -> None:
        for address, size in self._maps:
            _libc.munmap(address, size)
        self._maps.clear()

    def copy(self, tensor: torch.Tensor, at_end: bool = True) -> torch.Tensor:
        """A contiguous copy; one of no elements is the tensor itself."""
        size = tensor.numel() * tensor.element_size()
        if not size:
            return tensor
        pages = -(-size // PAGE) * PAGE
        start = self._map(pages + 2 * PAGE) + PAGE
        address = start + (pages - size if at_end else 0)
        buffer = (ctypes.c_char * size).from_address(address)
        return torch.frombuffer(buffer, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)

    def _map(self, size: int) -> int:
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, kind, -1, 0)
        if address is None or address == _MAP_FAILED:
            raise MemoryError(f"mmap of {size} bytes: errno {ctypes.get_errno()}")
        self._maps.append((address, size))
        for page in (address, address + size - PAGE):
            if _libc.mprotect(page, PAGE, 0):  # PROT_NONE
                raise OSError(ctypes.get_errno(), "mprotect")
        return address
