"""Means over seeds, and differences paired by seed.

No p-values: three seeds carry none. The ratio of a mean difference to its standard deviation, and how many seeds agree on
its sign, say what there is to say.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation (n - 1) over `count` seeds; `sd` is None for one seed, both are NaN if a value is."""

    mean: float
    sd: float | None
    count: int


@dataclass(frozen=True)
class PairedDifference:
    """Candidate minus baseline over the `count` seeds that both have.

    `ratio`: |mean| / sd, None for one seed or where every difference is zero, infinite where all are the same;
    `won`: seeds at which the candidate is strictly better.
    """

    mean: float
    sd: float | None
    ratio: float | None
    won: int
    count: int


def summarize(values: Sequence[float]) -> Summary:
    """Summary of at least one value, one per seed. Raises ValueError for none."""
    if not values:
        raise ValueError("nothing to summarize: give at least one value")
    if not all(map(math.isfinite, values)):  # one run that diverged is not averaged away
        return Summary(math.nan, math.nan if len(values) > 1 else None, len(values))
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def paired_difference(
    candidate: Mapping[int, float], baseline: Mapping[int, float], *, lower_is_better: bool
) -> PairedDifference | None:
    """Difference of two measures given as {seed: value}; None if they share no seed."""
    seeds = sorted(candidate.keys() & baseline.keys())
    if not seeds:
        return None
    differences = [candidate[seed] - baseline[seed] for seed in seeds]
    summary = summarize(differences)
    won = sum(d < 0 if lower_is_better else d > 0 for d in differences)
    return PairedDifference(summary.mean, summary.sd, _ratio(summary), won, summary.count)


def _ratio(summary: Summary) -> float | None:
    if summary.sd is None:
        return None
    if summary.sd == 0:
        return math.inf if summary.mean else None
    return abs(summary.mean) / summary.sd
