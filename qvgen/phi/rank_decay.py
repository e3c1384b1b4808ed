"""Rank decay of the auxiliary module Φ: a pure function of the training step (QVGen, section 3.3).

The run is `hold_steps` with Φ at full rank, then phases of `phase_steps`. In a phase that starts at rank r the last λr
singular directions are scaled by u, which falls from 1 to 0 at the phase's last step, and are then cut; in the phase that
starts at rank 1 all of Φ decays. `final_steps` without Φ follow, so that the weights can recover with a learning rate above
zero (the public code leaves them 2-3 steps).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Annealing = Literal["cosine", "linear", "exponential", "logarithmic", "square"]

# u as a function of the progress p in [0, 1] of a phase: 1 at p = 0, 0 at p = 1, falling all the way.
ANNEALINGS: dict[str, Callable[[float], float]] = {
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    "linear": lambda p: 1 - p,
    "exponential": lambda p: (math.exp(-5 * p) - math.exp(-5)) / (1 - math.exp(-5)),
    "logarithmic": lambda p: 1 - math.log1p(p * (math.e - 1)),
    "square": lambda p: 1 - p * p,
}


@dataclass(frozen=True)
class RankState:
    """Φ at one step: `rank` columns, of which the last `decaying` are scaled by `u`."""

    rank: int
    decaying: int
    u: float

    @property
    def gamma(self) -> list[float]:
        """γ = [1] * (rank - decaying) + [u] * decaying."""
        return [1.0] * (self.rank - self.decaying) + [self.u] * self.decaying


@dataclass(frozen=True)
class RankDecaySchedule:
    initial_rank: int
    decay_ratio: float = 0.5
    annealing: Annealing = "cosine"
    hold_steps: int = 0
    phase_steps: int = 1
    final_steps: int = 0
    phase_ranks: tuple[int, ...] = field(init=False)  # rank at the start of each phase, such as 32, 16, 8, 4, 2, 1

    def __post_init__(self) -> None:
        if self.annealing not in ANNEALINGS:
            raise ValueError(f"annealing {self.annealing!r} is unknown; choose one of {', '.join(ANNEALINGS)}")
        if not 0 < self.decay_ratio <= 1:
            raise ValueError(f"decay_ratio must be in (0, 1], got {self.decay_ratio}")
        if self.initial_rank < 0 or self.hold_steps < 0 or self.phase_steps < 1 or self.final_steps < 0:
            raise ValueError("initial_rank, hold_steps and final_steps must be >= 0 and phase_steps >= 1")
        ranks, rank = [], self.initial_rank
        while rank > 0:
            ranks.append(rank)
            rank -= self._decaying(rank)
        object.__setattr__(self, "phase_ranks", tuple(ranks))

    @property
    def decay_end(self) -> int:
        """First step without Φ."""
        return self.hold_steps + len(self.phase_ranks) * self.phase_steps

    @property
    def total_steps(self) -> int:
        return self.decay_end + self.final_steps

    def at(self, step: int) -> RankState:
        """State during optimizer step `step` (0-based). From step `decay_end` on Φ is empty."""
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        if step >= self.decay_end or not self.phase_ranks:
            return RankState(0, 0, 0.0)
        if step < self.hold_steps:
            return RankState(self.initial_rank, 0, 1.0)
        phase, within = divmod(step - self.hold_steps, self.phase_steps)
        rank = self.phase_ranks[phase]
        return RankState(rank, self._decaying(rank), ANNEALINGS[self.annealing]((within + 1) / self.phase_steps))

    def _decaying(self, rank: int) -> int:
        """Directions that a phase starting at `rank` removes: λ rank, at least one."""
        return max(1, math.floor(self.decay_ratio * rank))
