"""Data-parallel training: processes that share each batch, one for each GPU, or for some of the cores of a CPU.

Every process ("rank") holds the whole student and takes the same steps: it computes the gradient of its share of a batch, and
`average_` makes of them the gradient of the whole. Rank 0 is the process that asks; it starts the others on the same machine,
and they train along and write nothing. Results are those of one process up to rounding.

Not DistributedDataParallel: Φ changes its shape while it decays, so that the wrapper would have to be made anew, and families
call the model by its own attributes. Gradients are not sent while the backward pass still runs.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_TOGETHER = 1 << 22  # numbers that small tensors are sent in at a time
_PATIENCE = timedelta(hours=1)  # for rank 0, while it writes a state of training
_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"  # nothing listens to other machines


@dataclass(frozen=True)
class Ranks:
    """This process among `size`. `device`: where it computes."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def average_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Each tensor becomes its mean over the ranks, which all give tensors of the same shapes in the same order."""
        if self.size == 1:
            return
        for together in _portions(tensors):
            in_place = len(together) == 1 and together[0].is_contiguous()
            flat = together[0] if in_place else torch.cat([tensor.reshape(-1) for tensor in together])
            dist.all_reduce(flat)
            flat /= self.size
            if not in_place:
                parts = flat.split([tensor.numel() for tensor in together])
                torch._foreach_copy_(together, [part.view_as(t) for part, t in zip(parts, together, strict=True)])

    def copy_from_first_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Each tensor becomes that of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)


@contextmanager
def ranks(size: int, device: torch.device, replica: Callable[[Ranks], object]) -> Iterator[Ranks]:
    """`size` processes, or as many as there are GPUs: this one, and others that each call `replica`, which must be importable
    (a function of a module, or a partial of one) and communicate as this process does within the block. On the CPU they
    share the threads.

    Raises ValueError if one of the others ends before its time; what it said is on stderr.
    """
    devices = devices_from(device, size)
    if len(devices) < size:
        print(f"compute.processes = {size}, but GPUs for {len(devices)} from {device} on: results are the same up to rounding")
    if (size := len(devices)) == 1:
        yield Ranks(device)
        return
    threads = torch.get_num_threads()
    each = max(1, threads // size)
    context = mp.get_context("spawn")  # a stage has threads, and may have a GPU, which a fork would break
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        others = [
            context.Process(target=_other, args=(Ranks(devices[rank], rank, size), store, each, replica), name=f"rank {rank}")
            for rank in range(1, size)
        ]
        try:
            for process in others:
                process.start()
            torch.set_num_threads(each)
            _join_group(store, first := Ranks(devices[0], 0, size))
            yield first
            for process in others:
                process.join()
        except RuntimeError as error:
            for process in others:
                process.join(10)  # whoever ended first is ending still
            if ended := [f"{process.name} with exit code {process.exitcode}" for process in others if process.exitcode]:
                raise ValueError(f"a process of training ended: {', '.join(ended)}; what it said stands above") from error
            raise
        finally:
            for process in others:
                if process.pid is not None:
                    process.terminate()
                    process.join()
            if dist.is_initialized():
                dist.destroy_process_group()
            torch.set_num_threads(threads)


def devices_from(device: torch.device, size: int) -> list[torch.device]:
    """That of each rank: GPUs from `device` on, or the CPU for all. Where there are fewer GPUs, the largest part of `size`
    that they are enough for and that divides it, and so the batch."""
    if device.type != "cuda":
        return [device] * (size if device.type == "cpu" else 1)
    first = device.index or 0
    possible = [n for n in range(1, size + 1) if size % n == 0 and first + n <= max(torch.cuda.device_count(), first + 1)]
    return [torch.device("cuda", first + rank) for rank in range(possible[-1])]


def _join_group(store: Path, ranks: Ranks) -> None:
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, _INTERFACE)
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    dist.init_process_group(
        "nccl" if ranks.device.type == "cuda" else "gloo",
        store=dist.FileStore(str(store), ranks.size),  # a store on a port would listen to the whole network
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=_PATIENCE,
    )


def _other(ranks: Ranks, store: Path, threads: int, replica: Callable[[Ranks], object]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; rank 0 ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        _join_group(store, ranks)
        replica(ranks)
    except FloatingPointError:  # the same numbers, and rank 0 says it
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _end_with_parent() -> None:
    """A parent that was killed cannot end its children, and those wait for it an hour."""
    parent: Any = parent_process()
    connection.wait([parent.sentinel])
    os._exit(1)


def _portions(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Those of a dtype in portions of about _TOGETHER numbers; a tensor as large stands alone."""
    small: dict[torch.dtype, tuple[list[torch.Tensor], int]] = {}
    for tensor in tensors:
        if tensor.numel() >= _TOGETHER:
            yield [tensor]
            continue
        portion, count = small.get(tensor.dtype, ([], 0))
        portion.append(tensor)
        small[tensor.dtype] = portion, count + tensor.numel()
        if count + tensor.numel() >= _TOGETHER:
            yield small.pop(tensor.dtype)[0]
    for portion, _ in small.values():
        yield portion
