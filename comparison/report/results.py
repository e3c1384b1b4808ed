"""The result folders of the comparison, read and checked.

`results/<case>/` belongs to one run. It holds scores.json and, where they apply, curve.csv (trained methods),
singular_values.json (methods with Φ), and clips.safetensors with clips.json: the same prompts and noise for every run and for
`results/full_precision`. Any of them may be missing.
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

FULL_PRECISION = "full_precision"
COMPARED = ("main", "low")  # groups whose runs without a variant stand side by side


@dataclass(frozen=True)
class Run:
    """One folder. `bits` such as "W4A4"; `variant` is "" or what differs from the method's defaults ("decay_ratio=0.25")."""

    folder: Path
    method: str
    bits: str
    seed: int
    group: str
    variant: str
    scores: dict[str, Any]

    @property
    def case(self) -> str:
        return self.folder.name

    @property
    def compared(self) -> bool:
        return self.group in COMPARED and not self.variant

    def number(self, name: str) -> float | None:
        """A measure of scores.json; None if it is absent or null. "speedup" is that of a step over fp32, timed in turn: two
        cases run at a time, so that milliseconds alone say little."""
        if name == "speedup":
            step, fp32 = self.number("step_ms"), self.number("step_ms_fp32")
            return fp32 / step if step and fp32 else None
        value = self.scores.get(name)
        return None if value is None else float(value)

    def on_first_prompts(self, count: float | None) -> Run:
        """This run with PSNR of its first `count` prompts only; as it is if it does not have as many single ones."""
        single = self.scores.get("psnr_db_by_prompt", ())
        if count is None or not 0 < count < len(single):
            return self
        first = single[: int(count)]
        return replace(self, scores=self.scores | {"psnr_db": sum(first) / len(first)})

    def curve(self) -> dict[str, list[float]]:
        """Columns of curve.csv; {} for a method that is not trained."""
        path = self.folder / "curve.csv"
        if not path.is_file():
            return {}
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows] for name in rows[0]} if rows else {}

    def singular_values(self) -> dict[str, Any]:
        """{"limit", "step", "share_small", "rank", "values"}; {} for a method without Φ."""
        path = self.folder / "singular_values.json"
        return _read_json(path) if path.is_file() else {}

    def clips(self) -> tuple[list[str], torch.Tensor] | None:
        """Prompts and clips (P, 3, t, h, w) in [-1, 1]; None if the run kept none."""
        from safetensors.torch import load_file

        pixels, prompts = self.folder / "clips.safetensors", self.folder / "clips.json"
        if not pixels.is_file() or not prompts.is_file():
            return None
        clips, words = load_file(pixels)["clips"], _read_json(prompts)
        if clips.ndim != 5 or clips.shape[1] != 3 or len(clips) != len(words):
            raise ValueError(f"{pixels} has clips {tuple(clips.shape)} for {len(words)} prompts; repeat the run {self.case}")
        return words, clips.float() / 127.5 - 1


@dataclass(frozen=True)
class Results:
    """Runs in the order of the report. `unfinished`: folders without scores.json."""

    runs: tuple[Run, ...]
    full_precision: Run | None
    unfinished: tuple[str, ...]

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
    """Read every subfolder. Raises ValueError if there is no run at all, or if a file contradicts another."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    finished = [path for path in folders if (path / "scores.json").is_file()]
    if not finished:
        raise ValueError(f"{folder} has no run: no subfolder holds a scores.json; run the comparison first")
    runs = [_read_run(path) for path in finished]
    seen: dict[tuple[object, ...], str] = {}
    for run in runs:
        tried = run.number("learning_rate_factor") if run.group == "tuning" else None
        key = (run.group if not run.compared else "", run.method, run.bits, run.seed, run.variant, tried)
        if key in seen:
            raise ValueError(f"{folder}: {seen[key]} and {run.case} are the same run by their scores.json; delete one of them")
        seen[key] = run.case
    quantized = [run for run in runs if run.case != FULL_PRECISION]
    return Results(
        runs=tuple(sorted(quantized, key=lambda r: (r.group, bits_order(r.bits), r.method, r.variant, r.seed))),
        full_precision=next((run for run in runs if run.case == FULL_PRECISION), None),
        unfinished=tuple(path.name for path in folders if path not in finished),
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


def _read_run(folder: Path) -> Run:
    path = folder / "scores.json"
    scores = _read_json(path)
    if folder.name == FULL_PRECISION:
        return Run(folder, FULL_PRECISION, "", 0, "reference", "", scores)
    group = scores.get("group") or "main"
    needed = ("method", "seed") if group == "reference" else ("method", "bits", "seed")
    missing = [name for name in needed if scores.get(name) is None]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; repeat the run {folder.name}")
    return Run(
        folder,
        method=str(scores["method"]),
        bits=str(scores.get("bits") or ""),
        seed=int(scores["seed"]),
        group=group,
        variant=scores.get("variant") or "",
        scores=scores,
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete its folder and repeat the run") from error
