"""The ranking of the methods in the comparison, how sure it is, and which cases are missing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from comparison.report.results import Results, Run, bits_order, by_method, by_seed
from comparison.report.statistics import PairedDifference, Summary, paired_difference, summarize
from comparison.report.words import MEASURES, METHOD_NOTES, Kind, count, method_order


def summary_of(runs: Sequence[Run], measure: str) -> Summary | None:
    """Over the seeds that have the measure; None if none has."""
    values = list(by_seed(list(runs), measure).values())
    return summarize(values) if values else None


def ranked(methods: dict[str, list[Run]], measure: str = "velocity_mse") -> list[str]:
    """Names by mean, smallest first; diverged runs and those without the measure last."""

    def key(name: str) -> tuple[float, tuple[int, str]]:
        summary = summary_of(methods[name], measure)
        mean = math.inf if summary is None or not math.isfinite(summary.mean) else summary.mean
        return mean, method_order(name)

    return sorted(methods, key=key)


def best_without_cost(methods: dict[str, list[Run]]) -> str | None:
    """The method of smallest mean velocity error whose model runs at no cost beyond its bits."""
    free = {name: runs for name, runs in methods.items() if all(run.scores.get("zero_inference_cost") for run in runs)}
    best = next(iter(ranked(free)), None)
    summary = summary_of(free[best], "velocity_mse") if best else None
    return best if summary and math.isfinite(summary.mean) else None


def verdict(methods: dict[str, list[Run]], best: str | None) -> str:
    """How sure the first place is: the paired difference to the next of the free methods."""
    if best is None:
        return ""
    text = f"Smallest velocity error without extra inference cost: {best}."
    free = {name: runs for name, runs in methods.items() if all(run.scores.get("zero_inference_cost") for run in runs)}
    second = next((name for name in ranked(free) if name != best), None)
    difference = paired(methods[best], methods[second], "velocity_mse") if second else None
    if second is None or difference is None:
        return text
    sure = f"smaller than that of {second}, the next, at {difference.won} of {count(difference.count, 'shared seed')}"
    if difference.ratio is not None and difference.ratio < 1:
        sure += "; the mean difference is below its standard deviation, so call it a tie"
    return f"{text} Its error is {sure}."


def paired(candidate: list[Run], baseline: list[Run], key: str) -> PairedDifference | None:
    lower = MEASURES[key].better == "lower"
    return paired_difference(by_seed(candidate, key), by_seed(baseline, key), lower_is_better=lower)


def kind_of(name: str, runs: list[Run]) -> Kind:
    if name in METHOD_NOTES:
        return METHOD_NOTES[name].kind
    return "training" if any(run.number("train_seconds") for run in runs) else "no training"


def missing(results: Results) -> list[str]:
    """Cases that are missing from the matrix, a sentence each."""
    lines = []
    if not results.bits:
        lines.append("No method has a finished run yet.")
    if results.full_precision is None:
        lines.append("The full-precision model has no scores: its row and its videos are absent.")
    main = [run for run in results.runs if run.group == "main" and run.compared]
    seeds, present = {run.seed for run in main}, {(run.method, run.bits, run.seed) for run in main}
    for bits in sorted({run.bits for run in main}, key=bits_order):
        for name in sorted(by_method(main), key=method_order):
            absent = sorted(seed for seed in seeds if (name, bits, seed) not in present)
            if absent:
                what = "no run" if len(absent) == len(seeds) else f"no seed {', '.join(map(str, absent))}"
                lines.append(f"{name} at {bits}: {what}.")
    return lines
