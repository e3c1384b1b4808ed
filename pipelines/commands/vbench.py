"""`qvgen vbench`: the real VBench over a folder of generated videos; files that it lacks are named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from qvgen.evaluation.vbench.evaluate import Outcome, average, evaluate, find_package
from qvgen.evaluation.vbench.weights import NEEDED, PAPER_DIMENSIONS, check_dimensions, missing

REFUSED = 3  # exit code: some dimensions were refused, none failed


def run(
    videos: Path | None,
    dims: str | None,
    python: str | None,
    *,
    partial: bool = False,
    keep: Path | None = None,
    list_prompts: bool = False,
    as_json: bool = False,
) -> int:
    """Print the scores, or without `videos` which files are needed and which are there; the exit code: 0 if all
    dimensions asked for have a score (or their files), 3 if some were refused, 1 if one failed."""
    wanted = check_dimensions([name.strip() for name in dims.split(",")] if dims is not None else list(PAPER_DIMENSIONS))
    if list_prompts:
        package = find_package(python)
        print("\n".join(dict.fromkeys(prompt for dimension in wanted for prompt in package.prompts[dimension])))
        return 0
    if videos is None:
        return _needs(wanted, as_json)
    tell = (lambda dimension: print(f"evaluating {dimension}", file=sys.stderr)) if sys.stderr.isatty() else lambda _: None
    outcomes = evaluate(find_package(python), videos, wanted, partial=partial, keep=keep, on_dimension=tell)
    if as_json:
        print(json.dumps(report(outcomes), indent=2))
    else:
        _show(outcomes)
    if any(outcome.error for outcome in outcomes.values()):
        return 1
    return REFUSED if any(outcome.refused for outcome in outcomes.values()) else 0


def report(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """{"dims", "average", "average_of", "asked"}: the average is over `average_of` of the `asked` dimensions."""
    return {
        "dims": {dimension: outcome.as_dict() for dimension, outcome in outcomes.items()},
        "average": average(outcomes),
        "average_of": sum(outcome.score is not None for outcome in outcomes.values()),
        "asked": len(outcomes),
    }


def _show(outcomes: dict[str, Outcome]) -> None:
    """A table of the scores, then, unbroken so that they can be copied, the reasons for those there are not."""
    from rich.console import Console
    from rich.table import Table

    table = Table("dimension", "score", "videos")
    for dimension, outcome in outcomes.items():
        score = "refused" if outcome.refused else "failed" if outcome.error else f"{outcome.score:.4f}"
        table.add_row(dimension, score, f"{outcome.videos} of {outcome.expected}")
    console = Console(highlight=False)
    console.print(table)
    content = report(outcomes)
    if content["average_of"]:
        of = f"{content['average_of']} of the {content['asked']} dimensions asked for"
        print(f"Mean over {of}: {content['average']:.4f}")
    for dimension, outcome in outcomes.items():
        if outcome.refused or outcome.error:
            print(f"\n{dimension} {'was refused' if outcome.refused else 'failed'}: {outcome.refused or outcome.error}")


def _needs(dimensions: list[str], as_json: bool) -> int:
    """Each dimension's weight files: where they must lie, whether they do, where they come from, their licence."""
    needs = {
        dimension: [
            {"path": str(file.expected()), "there": file.found(), "source": file.source, "licence": file.licence}
            for file in NEEDED[dimension]
        ]
        for dimension in dimensions
    }
    if as_json:
        print(json.dumps(needs, indent=2))
    else:
        for dimension, files in needs.items():
            print(dimension if files else f"{dimension}: needs no files")
            for file in files:
                print(f"  {'there  ' if file['there'] else 'missing'}  {file['path']}")
                print(f"           {file['source']} ({file['licence']})")
    return REFUSED if any(missing(name) for name in dimensions) else 0
