"""The share that this process has of work that several do together, on one host or on several with a common folder.

Which process this is, and of how many, say RANK and WORLD_SIZE, the variables that torchrun sets. Work is cut into numbered
pieces before it begins, a piece belongs to one process whatever becomes of the others, and what it gives does not depend on
how many there are. They meet in files alone: a process that was stopped is started again and goes on.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

POLL_SECONDS, PATIENCE_SECONDS = 0.5, 30.0  # between two looks at what others have made, and two lines about it


@dataclass(frozen=True)
class Share:
    """Process `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> Share:
        """Of RANK and WORLD_SIZE; without them this process is alone. Raises ValueError for what is no such pair."""
        given = {name: os.environ.get(name) or default for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
        for name, value in given.items():
            if not (value.isascii() and value.isdigit()):
                raise ValueError(f"{name}={value:.40} is no number: it counts processes (RANK from 0 on), as torchrun sets it")
        found = cls(int(given["RANK"]), int(given["WORLD_SIZE"]))
        if found.rank >= found.world_size:
            raise ValueError(f"RANK={found.rank} must be below WORLD_SIZE={found.world_size}, the number of processes")
        return found

    @property
    def is_main(self) -> bool:
        """Whether this process puts together what all have made."""
        return self.rank == 0

    def has(self, piece: int) -> bool:
        return piece % self.world_size == self.rank

    def wait(self, what: str, missing: Callable[[], Sequence[int]]) -> None:
        """Until no pieces are missing, which the other processes make; says from time to time whom it waits for."""
        tell = time.monotonic() + PATIENCE_SECONDS
        while left := missing():
            if time.monotonic() >= tell:
                tell += PATIENCE_SECONDS
                ranks = ", ".join(f"RANK={rank}" for rank in sorted({piece % self.world_size for piece in left}))
                print(
                    f"waiting for {len(left)} pieces of {what}, which processes with {ranks} and "
                    f"WORLD_SIZE={self.world_size} make: start one that does not run, it goes on",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(POLL_SECONDS)


ALONE = Share()
