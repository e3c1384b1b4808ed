"""Stage report: the results of all cases as reports/comparison.csv, a few plots, and one self-contained page.

Reads comparison/results, comparison/clips where there are any, and comparison/findings.md, which says in words what was found.
The page, reports/comparison.html, is neither in git nor an output that DVC knows: it is 5 MB, and made again in seconds.
"""

from __future__ import annotations

from comparison.cases import FOLDER, RESULTS
from stages.runtime.run import Stage, stage_main

FINDINGS = FOLDER / "findings.md"


def run(stage: Stage) -> None:
    from comparison.report.page import write_report

    findings = (stage.root / FINDINGS).read_text(encoding="utf-8")
    write_report(stage.root / RESULTS, stage.root / "reports", findings)
    stage.log_artifact("reports")


if __name__ == "__main__":
    stage_main("report", run)
