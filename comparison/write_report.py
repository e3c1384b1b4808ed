"""Stage compare_report: the results of all cases as reports/comparison.csv, one self-contained page, and plots.

Reads comparison/results and comparison/findings.md, which says in words what was found.
"""

from __future__ import annotations

from comparison.cases import FOLDER, RESULTS
from stages.runtime.run import Stage, stage_main

FINDINGS = FOLDER / "findings.md"


def run(stage: Stage) -> None:
    from comparison.report.page import write_report

    findings = (stage.root / FINDINGS).read_text(encoding="utf-8")
    with stage.outputs("reports") as folder:
        write_report(stage.root / RESULTS, folder, findings)
    stage.log_artifact("reports")


if __name__ == "__main__":
    stage_main("compare_report", run)
