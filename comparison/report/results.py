"""The result files of the comparison, read and checked.

`results/<case>.json` belongs to one run, see comparison/store.py. Curve (trained methods) and spectrum (methods with Φ) may be
missing, and so may `clips/<case>.safetensors` beside the folder: the same prompts and noise for every run and for
`full_precision`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparison.store import read_clips, read_result

if TYPE_CHECKING:
    import torch

FULL_PRECISION = "full_precision"
COMPARED = ("main", "low")  # groups whose runs without a variant stand side by side


@dataclass(frozen=True)
class Run:
    """One file. `bits` such as "W4A4"; `variant` is "" or what differs from the method's defaults ("decay_ratio=0.25")."""

    path: Path
    method: str
    bits: str
    seed: int
    group: str
    variant: str
    scores: dict[str, Any]
    curve: dict[str, list[float]] = field(default_factory=dict)  # columns; {} for a method that is not trained
    # {"limit", "step", "share_small", "rank", "values"}; {} for a method without Φ
    singular_values: dict[str, Any] = field(default_factory=dict)

    @property
    def case(self) -> str:
        return self.path.stem

    @property
    def compared(self) -> bool:
        return self.group in COMPARED and not self.variant

    def number(self, name: str) -> float | None:
        """A measure; None if it is absent or null. "speedup" is that of a step over fp32, timed in turn: two
        cases run at a time, so that milliseconds alone say little."""
        if name == "speedup":
            step, fp32 = self.number("step_ms"), self.number("step_ms_fp32")
            return fp32 / step if step and fp32 else None
        value = self.scores.get(name)
        return None if value is None else float(value)

    def on_first_prompts(self, count: float | None) -> Run:
        """This run with PSNR of its first `count` prompts only; as it is if it has no others, or not as many single ones."""
        single = self.scores.get("psnr_db_by_prompt", ())
        if count is None or not 0 < count <= len(single) or count == self.number("prompts"):
            return self
        first = single[: int(count)]
        return replace(self, scores=self.scores | {"psnr_db": sum(first) / len(first)})

    def clips(self) -> tuple[list[str], torch.Tensor] | None:
        """Prompts and clips (P, 3, t, h, w) in [-1, 1]; None if the run kept none, or they are not on this machine."""
        path = self.path.parent.with_name("clips") / f"{self.case}.safetensors"
        found = read_clips(path)
        if found and (found[1].ndim != 5 or found[1].shape[1] != 3 or len(found[1]) != len(found[0])):
            shape = tuple(found[1].shape)
            raise ValueError(f"{path} has clips {shape} for {len(found[0])} prompts; repeat the run {self.case}")
        return found


@dataclass(frozen=True)
class Results:
    """Runs in the order of the report."""

    runs: tuple[Run, ...]
    full_precision: Run | None

    @property
    def bits(self) -> list[str]:
        """Of the compared runs, from most to least."""
        return sorted({run.bits for run in self.runs if run.compared}, key=bits_order)

    def compared(self, bits: str) -> dict[str, list[Run]]:
        """{method: its runs, one per seed} with these bits, default settings only."""
        return by_method([run for run in self.runs if run.compared and run.bits == bits])

    def references(self) -> dict[str, list[Run]]:
        """Models that are not quantized, besides full precision itself."""
        return by_method([run for run in self.runs if run.group == "reference"])


def read_results(folder: Path) -> Results:
    """Read every file. Raises ValueError if there is none at all, or if a file contradicts another."""
    paths = sorted(folder.glob("[!.]*.json"))
    if not paths:
        raise ValueError(f"{folder} has no run: it holds no <case>.json; run the comparison first")
    runs = [_read_run(path) for path in paths]
    seen: dict[tuple[object, ...], str] = {}
    for run in runs:
        tried = run.number("learning_rate_factor") if run.group == "tuning" else None
        key = (run.group if not run.compared else "", run.method, run.bits, run.seed, run.variant, tried)
        if key in seen:
            raise ValueError(f"{folder}: {seen[key]} and {run.case} are the same run by their scores; delete one of them")
        seen[key] = run.case
    quantized = [run for run in runs if run.case != FULL_PRECISION]
    return Results(
        runs=tuple(sorted(quantized, key=lambda r: (r.group, bits_order(r.bits), r.method, r.variant, r.seed))),
        full_precision=next((run for run in runs if run.case == FULL_PRECISION), None),
    )


def by_method(runs: list[Run]) -> dict[str, list[Run]]:
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.method, []).append(run)
    return grouped


def by_seed(runs: list[Run], measure: str) -> dict[int, float]:
    """{seed: value} of the runs that have the measure."""
    values = {run.seed: run.number(measure) for run in runs}
    return {seed: value for seed, value in values.items() if value is not None}


def bits_order(bits: str) -> tuple[int, int, str]:
    """Sort key: more bits first; at equal sums more weight bits first; other names last."""
    found = re.fullmatch(r"W(\d+)A(\d+)", bits)
    if not found:
        return (1, 0, bits)
    weights, activations = map(int, found.groups())
    return (-weights - activations, -weights, bits)


def _read_run(path: Path) -> Run:
    result = read_result(path) or {}
    scores = result.get("scores", {})
    if path.stem == FULL_PRECISION:
        return Run(path, FULL_PRECISION, "", 0, "reference", "", scores)
    group = scores.get("group") or "main"
    needed = ("method", "seed") if group == "reference" else ("method", "bits", "seed")
    missing = [name for name in needed if scores.get(name) is None]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; repeat the run {path.stem}")
    return Run(
        path,
        method=str(scores["method"]),
        bits=str(scores.get("bits") or ""),
        seed=int(scores["seed"]),
        group=group,
        variant=scores.get("variant") or "",
        scores=scores,
        curve=result.get("curve", {}),
        singular_values=result.get("spectrum", {}),
    )
