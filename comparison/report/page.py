"""The comparison report: every quantization method side by side, from the files that the runs left.

    write_report(Path("results"), Path("reports"), findings=Path("findings.md").read_text())

comparison.csv has one line per run, comparison.html is one file that needs no network, plots/*.png are some of its plots.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from comparison.report.curves import spectrum_sentence, training_plots
from comparison.report.plots import error_plots, layer_errors, layer_plot
from comparison.report.ranking import kind_of, missing
from comparison.report.results import Results, Run, by_method, read_results
from comparison.report.style import Plot
from comparison.report.tables import (
    BASELINES,
    Table,
    ablation_table,
    cost_table,
    csv_text,
    markdown_summary,
    paired_table,
    summary_table,
    tuning_table,
    worst_layers_table,
)
from comparison.report.videos import scenes
from comparison.report.words import METHOD_NOTES, count, method_order

# As files of their own, for readers without the page; the others would weigh more in git than they tell.
PICTURES = ("ranking", "error_by_bits", "training_curves")

NO_CLIPS = (
    "The clips of seed 0 lie where its cases ran (comparison/clips), not in git, and there are none here: videos are absent. "
    "A case whose file in comparison/results is deleted runs again."
)


def write_report(results: Path, out: Path, findings: str | None = None) -> None:
    """Read the folder `results` and write the report into the folder `out`.

    `findings`: Markdown for the section on what Φ and rank decay add; HTML in it is shown as text. Without it the section is
    left out. Everything is made before anything is written, and each file replaces its old one whole. Raises ValueError if
    there is no run, or for result files that contradict each other.
    """
    read = read_results(results)
    plots = {plot.name: plot for plot in [*error_plots(read), *_layer_plots(read), *training_plots(read)]}
    pictures = {f"{name}.png": plots[name].png() for name in PICTURES if name in plots}
    page = _render(read, plots, findings)
    table = csv_text(read)
    for name, content in pictures.items():
        _replace(out / "plots" / name, content)
    for old in (out / "plots").glob("*.png"):  # of an earlier report that had more to show
        if old.name not in pictures:
            old.unlink()
    _replace(out / "comparison.csv", table.encode())
    _replace(out / "comparison.html", page.encode())


def markdown_table(results: Path) -> str:
    """The README's table: every method at W4A4 and W3A3, mean ± standard deviation over seeds."""
    return markdown_summary(read_results(results))


def _render(results: Results, plots: dict[str, Plot], findings: str | None) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda noun, number: count(number, noun)
    style, script = (_template(name) for name in ("comparison.css", "comparison.js"))
    text = _findings_html(findings) if findings and findings.strip() else None
    return environment.get_template("comparison.html.j2").render(
        _content(results, plots), style=style, script=script, findings=text
    )


def _template(name: str) -> str:
    return (files("comparison.report") / "templates" / name).read_text(encoding="utf-8")


def _content(results: Results, plots: dict[str, Plot]) -> dict[str, Any]:
    """What the template shows, in the order of its sections."""
    shown, left_out = scenes(results)
    bits = results.bits
    compared = [run for run in results.runs if run.compared]
    errors = {b: found for b in bits if (found := layer_errors(results, b))}
    return {
        "runs": len(results.runs),
        "seeds": sorted({run.seed for run in compared}),
        "bits": bits,
        "methods": _methods(results),
        "missing": missing(results) + ([] if shown or not compared else [NO_CLIPS]),
        "summaries": [summary_table(results, b) for b in bits],
        "paired": _present(paired_table(results, b, baseline) for b in bits for baseline in BASELINES),
        "plots": {name: {"alt": plot.alt, "uris": plot.data_uris()} for name, plot in plots.items()},
        "layers": [(f"layer_error_{b}", worst_layers_table(found, b)) for b, found in errors.items()],
        "spectrum": spectrum_sentence(results),
        "ablations": ablation_table(results),
        "tuning": tuning_table(results),
        "costs": _present(cost_table(results, b) for b in bits),
        "scenes": shown,
        "left_out": left_out,
    }


def _methods(results: Results) -> list[tuple[str, str, str]]:
    """(name, kind, what it is) of every method that has a run, and of the full-precision model."""
    runs: dict[str, list[Run]] = by_method(list(results.runs)) | {"full_precision": []}
    described = []
    for name in sorted(runs, key=method_order):
        note = METHOD_NOTES.get(name)
        described.append((name, kind_of(name, runs[name]), note.text if note else "No description of this method."))
    return described


def _layer_plots(results: Results) -> list[Plot]:
    return [plot for bits in results.bits if (plot := layer_plot(results, bits))]


def _present(tables: Any) -> list[Table]:
    return [table for table in tables if table is not None]


def _findings_html(text: str) -> str:
    """Markdown to HTML; HTML in it becomes text, and pictures stay links, so that the page loads nothing."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable("table").disable("image").render(text)


def _replace(path: Path, content: bytes) -> None:
    """Write beside `path` and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
