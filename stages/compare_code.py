"""Stage compare_code: one file that stands for the code that a case runs, comparison/code.json.

A hundred and seventy stages that depend on it need not list two dozen paths each: DVC would read them all whenever anything
of the project is run.
"""

from __future__ import annotations

import json

from stages._comparison import FOLDER
from stages._run import Stage, stage_main


def run(stage: Stage) -> None:
    with stage.outputs(FOLDER / "code.json") as path:
        path.write_text(json.dumps(dict(sorted(stage.facts.deps.items())), indent=2) + "\n")


if __name__ == "__main__":
    stage_main("compare_code", run)
