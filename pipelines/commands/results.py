"""`qvgen results`: the pipeline's measurements as one table, and where to go from there.

Numbers come from metrics/*.json only; a number that has not been measured is shown as such, never guessed.
"""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Column, metrics file, entry: of the quality numbers and of the speed numbers.
_QUALITY = {
    "fp32": ("evaluate", "full_precision"),
    "packed": ("evaluate", "packed"),
    "rtn": ("baselines", "rtn"),
    "mse": ("baselines", "mse"),
}


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


# Entry of those files, how the table calls it, how it is written. The first three exist for the embedded digits only.
_MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "colour": ("colour right", _percent),
    "direction": ("direction right", _percent),
    "digit": ("digit right", _percent),
    "psnr_db": ("PSNR, dB", "{:.2f}".format),
    "ssim": ("SSIM", "{:.4f}".format),
    "velocity_mse": ("velocity MSE", "{:.5f}".format),
    "latent_mse": ("latent MSE", "{:.4f}".format),
}
COLUMNS = ("fp32", "bf16", "packed", "rtn", "mse")
ABSENT = "–"


@dataclass(frozen=True)
class Row:
    """One measure: its name, a cell per column (ABSENT where it does not apply), and the command that measures it."""

    name: str
    cells: tuple[str, ...]
    command: str


def read_metrics(root: Path) -> dict[str, dict[str, Any]]:
    """{"evaluate", "baselines", "benchmark"} -> content of metrics/*.json; a file that is not there is left out."""
    found = {}
    for name in ("evaluate", "baselines", "benchmark"):
        path = root / "metrics" / f"{name}.json"
        if path.is_file():
            found[name] = json.loads(path.read_text())
    return found


def rows(metrics: dict[str, dict[str, Any]]) -> list[Row]:
    """The table, without measures that no file holds."""
    measured = metrics.get("evaluate", {}).get("packed", {})
    other = {key: (key, "{:.4g}".format) for key in measured if key not in _MEASURES}  # of a data set's own judge
    table = [
        *(_quality(metrics, key, name, form) for key, (name, form) in (_MEASURES | other).items()),
        _speed(metrics, "bytes", "transformer, MB", lambda n: f"{n / 1e6:.2f}"),
        _relative_size(metrics),
        _speed(metrics, "step_ms", "denoising step, ms", "{:.1f}".format),
        _speed(metrics, "video_s", "video, s", "{:.2f}".format),
        _speed(metrics, "peak_rss_mb", "peak memory, MB", "{:.0f}".format),
    ]
    return [row for row in table if any(cell != ABSENT for cell in row.cells)]


def facts(metrics: dict[str, dict[str, Any]]) -> list[str]:
    """The circumstances of the table's numbers, a sentence each."""
    lines = []
    if "evaluate" in metrics:
        count = metrics["evaluate"]["prompts"]
        lines.append(f"Quality: means over {count} prompts; PSNR, SSIM and errors against fp32 from the same noise.")
    if benchmark := metrics.get("benchmark"):
        lines.append(f"Speed: medians, kernel {benchmark['kernel']}, on {benchmark['device']}.")
        if (ratio := benchmark.get("bytes_ratio_wan2.1_1.3b")) is not None:
            lines.append(f"The same scheme packs Wan 2.1 1.3B to {_percent(ratio)} of bf16 (computed from its config).")
    return lines


def markdown_table(root: Path) -> str:
    """The README's table: every row with the command behind its numbers. Raises ValueError if nothing was measured."""
    metrics = _required(root)
    header = ["", *_headings(root), "measured by"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * len(COLUMNS) + "---|"]
    lines += [f"| {row.name} | {' | '.join(row.cells)} | `{row.command}` |" for row in rows(metrics)]
    prose = [line for fact in facts(metrics) for line in textwrap.wrap(fact, 120, break_on_hyphens=False)]
    return "\n".join([*lines, "", *prose])


def show(root: Path) -> None:
    """Print the table, where the pictures and the recorded run are, and what to do next."""
    from rich.console import Console
    from rich.table import Table

    metrics = _required(root)
    table = Table(title="Full precision against packed")
    table.add_column("")
    for heading in _headings(root):
        table.add_column(heading, justify="right", style="bold" if heading.startswith("packed") else "")
    for row in rows(metrics):
        table.add_row(row.name, *row.cells)
    console = Console(highlight=False)
    console.print(table)
    for line in [*facts(metrics), *_missing(metrics)]:
        console.print(line, soft_wrap=True)
    console.print()
    for name, value in {**_pictures(root), **_recorded(root), "make a video": _generate(root), **_NEXT}.items():
        console.print(f"{name:<16}{value}", soft_wrap=True, markup=False)


_NEXT = {
    "try a change": "dvc exp run -S scheme.weights.num_bits=3    then    dvc metrics diff",
    "training curves": "dvc plots show",
    "recorded runs": "make ui",
}


def _generate(root: Path) -> str:
    """The command, with a caption of the data."""
    captions = root / "artifacts" / "data" / "captions.json"
    prompt = json.loads(captions.read_text())[0] if captions.is_file() else "..."
    return shlex.join(["qvgen", "generate", "--model", "artifacts/packed", "--prompt", prompt, "--out", "video.mp4"])


def _required(root: Path) -> dict[str, dict[str, Any]]:
    metrics = read_metrics(root)
    if not metrics:
        raise ValueError(f"nothing is measured yet: {root / 'metrics'} has no evaluate.json; run `make repro` first")
    return metrics


def _missing(metrics: dict[str, dict[str, Any]]) -> list[str]:
    absent = [name for name in ("evaluate", "baselines", "benchmark") if name not in metrics]
    return [f"Not measured yet: {name} (run `dvc repro {name}`)." for name in absent]


def _headings(root: Path) -> list[str]:
    """COLUMNS, with the scheme that artifacts/packed really has, such as "packed W4A4"."""
    from qvgen.models.files import quantizations
    from qvgen.packing.config import from_config

    given = [from_config(config)[0].name for config in quantizations(root / "artifacts" / "packed")]
    if not given:
        return list(COLUMNS)
    names = " and ".join(dict.fromkeys(given))  # two transformers may have two
    return [f"packed {names}" if column == "packed" else column for column in COLUMNS]


def _quality(metrics: dict[str, dict[str, Any]], key: str, name: str, form: Callable[[float], str]) -> Row:
    cells = []
    for column in COLUMNS:
        file, entry = _QUALITY.get(column, ("", ""))
        value = metrics.get(file, {}).get(entry, {}).get(key)
        cells.append(ABSENT if value is None else form(value))
    return Row(name, tuple(cells), "dvc repro evaluate baselines")


def _speed(metrics: dict[str, dict[str, Any]], key: str, name: str, form: Callable[[float], str]) -> Row:
    values = metrics.get("benchmark", {}).get(key, {})
    return Row(name, tuple(form(values[c]) if c in values else ABSENT for c in COLUMNS), "dvc repro benchmark")


def _relative_size(metrics: dict[str, dict[str, Any]]) -> Row:
    sizes = metrics.get("benchmark", {}).get("bytes", {})
    share = {name: _percent(size / sizes["bf16"]) for name, size in sizes.items()}
    return Row("size over bf16", tuple(share.get(column, ABSENT) for column in COLUMNS), "dvc repro benchmark")


def _pictures(root: Path) -> dict[str, str]:
    folder = root / "artifacts" / "evaluation"
    found = {}
    if (folder / "contact_sheet.png").is_file():
        found["contact sheet"] = str((folder / "contact_sheet.png").relative_to(root))
    if videos := sorted(folder.glob("*.mp4")):
        found["videos"] = f"{folder.relative_to(root)}/*.mp4 ({len(videos)} side by side, such as {videos[0].name})"
    return found


def _recorded(root: Path) -> dict[str, str]:
    """The newest MLflow run that a stage's receipt names."""
    from stages.record.journal import FOLDER, read_receipt

    for journal in sorted((root / FOLDER).glob("[0-9]*.jsonl"), reverse=True):
        if receipt := read_receipt(journal):
            return {"MLflow run": f"{receipt.get('parent_run_id') or receipt['run_id']}"}
    return {}
