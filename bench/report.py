"""Tables and files of the benchmarks."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def geometric_mean(values: Iterable[float]) -> float:
    """Of at least one positive number."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on standard output, as wide as it needs to be; all columns but the first flush right."""
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    widths = (max(len(row[i]) for row in [header, *rows]) + 3 for i in range(len(header)))
    Console(width=max(sum(widths) + 1, len(title)), highlight=False).print(table)


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Each row of `rows` on a line. Written beside and renamed: whoever reads `path` finds the old
    file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for key, value in content.items():
        text = json.dumps(value)
        if key == "rows":
            text = "[\n    " + ",\n    ".join(json.dumps(row) for row in value) + "\n  ]"
        lines.append(f"  {json.dumps(key)}: {text}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    temporary.replace(path)
