"""Data-parallel training: processes that share each batch, one for each GPU, or for some of the cores of a CPU.

Every process ("rank") takes the same steps: it computes the gradient of its share of a batch, and `average_` makes of them the
gradient of the whole. Each holds the whole student, or some rows of every tensor (sharding.py). Rank 0 is the process that
asks; it starts the others on the same machine, or is one of a group that torchrun or a user has started, on one or several
hosts. The others train along and write nothing. Results are those of one process up to rounding.

Not DistributedDataParallel: Φ changes its shape while it decays, so that the wrapper would have to be made anew, and families
call the model by its own attributes. Gradients are not sent while the backward pass still runs.
"""

from __future__ import annotations

import os
import signal
import socket
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

from qvgen.share import Share

_TOGETHER = 1 << 22  # numbers that small tensors are sent in at a time
_PATIENCE = timedelta(hours=1)  # for rank 0, while it writes a state of training
_LOOPBACK = ("localhost", "127.0.0.1")


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

    def first_says(self, value: bool) -> bool:
        """The value that rank 0 gives."""
        said = torch.tensor(int(value), device=self.device)
        self.copy_from_first_([said])
        return bool(said)


@contextmanager
def ranks(size: int, device: torch.device, replica: Callable[[Ranks], object]) -> Iterator[Ranks]:
    """`size` processes, or as many as there are GPUs: this one, and others that each call `replica`, which must be importable
    (a function of a module, or a partial of one) and communicate as this process does within the block. On the CPU they
    share the threads.

    With RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment, as torchrun sets them, this process joins that
    group instead, of any size and on one host or several. Then the block is entered with every rank, and is to call
    `replica` where that is not 0.

    Raises ValueError if one of the others ends before its time; what it said is on stderr.
    """
    share = Share.from_environment()
    if share.world_size > 1 and os.environ.get("MASTER_ADDR"):
        with _joined(Ranks(device, share.rank, share.world_size)) as joined:
            yield joined
        return
    if not share.is_main:
        raise ValueError(
            f"RANK={share.rank}: processes of training meet at MASTER_ADDR and MASTER_PORT, as torchrun sets them"
        )
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
            _join_group(_file_store(store, size), first := Ranks(devices[0], 0, size))
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


@contextmanager
def _joined(ranks: Ranks) -> Iterator[Ranks]:
    host, port = os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT", "")
    if not port.isdigit():
        raise ValueError(
            f"MASTER_PORT={port:.40} is no number: it is the port at MASTER_ADDR={host:.100} where processes meet"
        )
    store = None  # torch's own, at that address: of torchrun, or of rank 0
    try:
        if host in _LOOPBACK:
            _stay_on_this_host()
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                store = _local_store(host, int(port), ranks)
        _join_group(store, ranks)
    except (dist.DistError, OSError) as error:
        raise ValueError(
            f"{ranks.size} processes did not meet at MASTER_ADDR={host:.100} MASTER_PORT={port}: {error}"
        ) from None
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def _local_store(host: str, port: int, ranks: Ranks) -> dist.Store:
    """A meeting place that only this host can reach: by itself TCPStore listens to the whole network."""
    listening = None if ranks.rank else socket.create_server((host, port)).detach()
    return dist.TCPStore(host, port, ranks.size, ranks.rank == 0, _PATIENCE, master_listen_fd=listening)


def _file_store(path: Path, size: int) -> dist.Store:
    """A meeting place that has no port. Its processes talk on this host alone."""
    _stay_on_this_host()
    return dist.FileStore(str(path), size)


def _stay_on_this_host() -> None:
    """Gloo and NCCL take the loopback interface, unless the user named another. Raises ValueError where there is none."""
    named = [name for _, name in socket.if_nameindex()]
    loopback = next((name for name in named if name in ("lo", "lo0")), None)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if loopback is None and variable not in os.environ:
            raise ValueError(f"no loopback interface among {', '.join(named)}: name one in {variable}")
        os.environ.setdefault(variable, loopback or "")


def _join_group(store: dist.Store | None, ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    dist.init_process_group(
        "nccl" if ranks.device.type == "cuda" else "gloo",
        store=store,
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=_PATIENCE,
    )


def _other(ranks: Ranks, store: Path, threads: int, replica: Callable[[Ranks], object]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; rank 0 ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        _join_group(_file_store(store, ranks.size), ranks)
        replica(ranks)
    except FloatingPointError:  # the same numbers, and rank 0 says it
        raise SystemExit(1) from None
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
