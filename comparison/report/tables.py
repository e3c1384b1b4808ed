"""Tables of the comparison report: text in rows, for the HTML page, the CSV file and the README."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from comparison.report.ranking import best_without_cost, paired, ranked, summary_of, verdict
from comparison.report.results import Results, Run, bits_order
from comparison.report.statistics import PairedDifference
from comparison.report.words import ABSENT, MEASURES, QUALITY, method_order

CSV_COLUMNS = (
    *("method", "bits", "seed", "velocity_mse", "latent_mse", "psnr_db", "ssim", "colour", "direction", "digit", "motion"),
    *("train_seconds", "peak_rss_mb", "bytes", "step_ms"),
)
BASELINES = ("kd", "qvgen")  # what every method is compared with, pair by pair
_WORST_LAYERS = 3
_README_BITS = ("W4A4", "W3A3")
_README_COLUMNS = ("velocity_mse", "psnr_db", "ssim", "colour", "direction", "digit", "bytes", "speedup")


@dataclass(frozen=True)
class Row:
    """`badges` stand beside the name: "best", "extra cost", "in use", "tie"; `kind` "reference" sets a row apart."""

    name: str
    cells: tuple[str, ...]
    badges: tuple[str, ...] = ()
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """`columns`: the first is that of the names; `words`: how many cells of a row, from the first on, are no numbers."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    words: int = 0


def summary_table(results: Results, bits: str) -> Table:
    """Every method at these bits by velocity error, then the models that are not quantized."""
    methods = results.compared(bits)
    shown = [key for key in QUALITY if any(run.number(key) is not None for runs in methods.values() for run in runs)]
    best = best_without_cost(methods)
    rows = [_summary_row(name, methods[name], shown, _badges(name, methods[name], best)) for name in ranked(methods)]
    references = results.references()
    if results.full_precision:
        references["full_precision"] = [results.full_precision]
    rows += [_summary_row(name, references[name], shown, (), "reference") for name in sorted(references, key=method_order)]
    columns = ("method", "seeds", *(MEASURES[key].heading for key in shown))
    return Table(f"{bits}: mean ± standard deviation over seeds", columns, tuple(rows), verdict(methods, best))


def paired_table(results: Results, bits: str, baseline: str) -> Table | None:
    """Every method minus the baseline, seed by seed; None without the baseline or anything to set against it."""
    methods = results.compared(bits)
    if baseline not in methods:
        return None
    rows = []
    for name in ranked(methods):
        error, psnr = (paired(methods[name], methods[baseline], key) for key in ("velocity_mse", "psnr_db"))
        if name != baseline and error:
            tie = error.ratio is not None and error.ratio < 1
            cells = (*_paired_cells(error, "velocity_mse"), *_paired_cells(psnr, "psnr_db")[:2])
            rows.append(Row(name, cells, ("tie",) if tie else ()))
    columns = ("method", "Δ velocity error", "sd of Δ", "|Δ| / sd", "seeds won", "Δ PSNR, dB", "sd of Δ PSNR")
    return Table(f"{bits}: difference to {baseline} (method − {baseline})", columns, tuple(rows)) if rows else None


def ablation_table(results: Results) -> Table | None:
    """Every variant beside the defaults of its method, and its difference to them on equal seeds and prompts."""
    ablations = [run for run in results.runs if run.group == "ablation"]
    rows = []
    for runs in _by_variant(ablations):
        first = runs[0]
        default = [run.on_first_prompts(first.number("prompts")) for run in results.compared(first.bits).get(first.method, [])]
        default = [run for run in default if run.seed in {run.seed for run in runs}]
        error = paired(runs, default, "velocity_mse")
        cells = (
            first.method,
            first.bits,
            str(len(runs)),
            MEASURES["velocity_mse"].summary(summary_of(runs, "velocity_mse")),
            MEASURES["velocity_mse"].summary(summary_of(default, "velocity_mse")),
            *_paired_cells(error, "velocity_mse"),
            MEASURES["psnr_db"].summary(summary_of(runs, "psnr_db")),
            MEASURES["psnr_db"].summary(summary_of(default, "psnr_db")),
        )
        rows.append(Row(first.variant or "default", cells))
    errors = ("velocity error ↓", "with defaults", "Δ", "sd of Δ", "|Δ| / sd", "seeds won")
    columns = ("variant", "method", "bits", "seeds", *errors, "PSNR, dB ↑", "with defaults")
    prompts = _range([run.number("prompts") for run in ablations], "{:.0f}".format)
    title = "One setting changed at a time" + ("" if prompts == ABSENT else f"; PSNR of the first {prompts} prompts")
    return Table(title, columns, tuple(rows), words=2) if rows else None


def tuning_table(results: Results) -> Table | None:
    """Runs that chose a learning rate; the factor that the compared runs use is marked."""
    keys = ("tuning_psnr_db", "tuning_velocity_mse", "final_loss", "mean_gradient_norm")
    rows = []
    for runs in _by_variant([run for run in results.runs if run.group == "tuning"]):
        first, factor = runs[0], runs[0].number("learning_rate_factor")
        main = [run for run in results.runs if run.compared and run.method == first.method]
        main = [run for run in main if run.bits == first.bits] or main
        in_use = factor is not None and any(run.number("learning_rate_factor") == factor for run in main)
        cells = (first.bits, ABSENT if factor is None else f"{factor:g}", _steps(runs), str(len(runs)))
        cells += tuple(MEASURES[key].summary(summary_of(runs, key)) for key in keys)
        rows.append(Row(first.method, cells, ("in use",) if in_use else ()))
    columns = ("method", "bits", "learning rate ×", "steps", "seeds", *(MEASURES[key].heading for key in keys))
    return Table("Short runs that chose each method's learning rate", columns, tuple(rows), words=1) if rows else None


def cost_table(results: Results, bits: str) -> Table | None:
    """Training and inference cost of every method at these bits."""
    keys = ("calibration_seconds", "train_seconds", "peak_rss_mb", "bytes", "step_ms")
    methods = results.compared(bits)
    rows = []
    for name in sorted(methods, key=method_order):
        cells = [MEASURES[key].summary(summary_of(methods[name], key)) for key in keys]
        if any(cell != ABSENT for cell in cells):
            rows.append(Row(name, (*cells, _ratio_to_fp32(methods[name])), _badges(name, methods[name], None)))
    columns = ("method", *(MEASURES[key].heading for key in keys), "times as fast as fp32 ↑")
    return Table(f"{bits}: cost, mean ± standard deviation over seeds", columns, tuple(rows)) if rows else None


def worst_layers_table(errors: dict[str, dict[str, float]], bits: str) -> Table:
    """The layers of largest error of every method, worst first; `errors` as from `report_plots.layer_errors`."""
    rows = []
    for name, layers in errors.items():
        worst = sorted(layers, key=lambda layer: -layers[layer])[:_WORST_LAYERS]
        cells = [f"{layer}: {layers[layer]:.3f}" for layer in worst]
        rows.append(Row(name, (*cells, *[ABSENT] * (_WORST_LAYERS - len(cells)))))
    columns = ("method", *("worst", "second", "third")[:_WORST_LAYERS])
    return Table(f"{bits}: the layers of largest error, mean over seeds", columns, tuple(rows), words=_WORST_LAYERS)


def csv_text(results: Results) -> str:
    """comparison.csv: one line per run; CSV_COLUMNS first, then every other plain entry of the scores."""
    runs = [*results.runs, *([results.full_precision] if results.full_precision else [])]
    lines = [
        {**run.scores, "case": run.case, "method": run.method, "bits": run.bits, "seed": run.seed}
        | {"group": run.group, "variant": run.variant}
        for run in runs
    ]
    # Six digits are more than any of these measurements has.
    lines = [
        {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in line.items()} for line in lines
    ]
    plain = {key for line in lines for key, value in line.items() if not isinstance(value, (dict, list))}
    columns = [*CSV_COLUMNS, *sorted(plain - set(CSV_COLUMNS))]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def markdown_summary(results: Results) -> str:
    """The README's table: every method at W4A4 and W3A3 by velocity error, mean ± standard deviation over seeds.

    Raises ValueError if there is no run at either.
    """
    if not set(results.bits) & set(_README_BITS):
        raise ValueError(f"no run at {' or '.join(_README_BITS)}; run the comparison first")
    headings = ("method", "bits", "seeds", *(MEASURES[key].heading for key in _README_COLUMNS))
    lines = ["| " + " | ".join(headings) + " |", "|---|---|" + "---:|" * (len(headings) - 2)]
    costly = False
    for bits in (b for b in _README_BITS if b in results.bits):
        methods = results.compared(bits)
        best = best_without_cost(methods)
        for name in ranked(methods):
            extra = "extra cost" in _badges(name, methods[name], None)
            costly |= extra
            shown = f"**{name}**" if name == best else name + (" †" if extra else "")
            cells = [MEASURES[key].summary(summary_of(methods[name], key)) for key in _README_COLUMNS]
            lines.append("| " + " | ".join((shown, bits, str(len(methods[name])), *cells)) + " |")
    notes = ["Bold: smallest velocity error among methods whose model runs at no cost beyond its bits."]
    if costly:
        notes.append("† Its model does more at inference than multiply quantized numbers.")
    return "\n".join([*lines, "", *notes])


def _summary_row(name: str, runs: list[Run], shown: list[str], badges: tuple[str, ...], kind: str = "") -> Row:
    cells = [MEASURES[key].summary(summary_of(runs, key)) for key in shown]
    seeds = ABSENT if name == "full_precision" else str(len(runs))
    return Row(name, (seeds, *cells), badges, kind)


def _badges(name: str, runs: list[Run], best: str | None) -> tuple[str, ...]:
    costs = any(run.scores.get("zero_inference_cost") is False for run in runs)
    return (("best",) if name == best else ()) + (("extra cost",) if costs else ())


def _paired_cells(difference: PairedDifference | None, key: str) -> tuple[str, str, str, str]:
    if difference is None:
        return ABSENT, ABSENT, ABSENT, ABSENT
    measure = MEASURES[key]
    ratio = ABSENT if difference.ratio is None else "∞" if math.isinf(difference.ratio) else f"{difference.ratio:.1f}"
    won = f"{difference.won} of {difference.count}"
    return measure.signed(difference.mean), measure.text(difference.sd), ratio, won


def _by_variant(runs: list[Run]) -> list[list[Run]]:
    """Runs that differ in nothing but the seed, together."""
    grouped: dict[tuple[str, str, str, float], list[Run]] = {}
    for run in runs:
        factor = run.number("learning_rate_factor") if run.group == "tuning" else None
        grouped.setdefault((run.method, run.bits, run.variant, factor or 0.0), []).append(run)
    return [grouped[key] for key in sorted(grouped, key=lambda k: (method_order(k[0]), bits_order(k[1]), *k[2:]))]


def _steps(runs: list[Run]) -> str:
    return _range([run.number("steps") for run in runs], "{:,.0f}".format)


def _range(values: Sequence[float | None], form: Callable[[float], str]) -> str:
    known = {value for value in values if value is not None}
    return " – ".join(form(value) for value in sorted({min(known), max(known)})) if known else ABSENT


def _ratio_to_fp32(runs: list[Run]) -> str:
    return MEASURES["speedup"].summary(summary_of(runs, "speedup"))
