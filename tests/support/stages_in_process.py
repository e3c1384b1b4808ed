"""Stages of a project, one after the other in this process: for tests of what crosses between them in files.

Eight processes would spend most of a small model's time on imports. What belongs to the process (DVC, the record, resuming,
signals) is tested where stages run as they do for users, in tests/integration/test_pipeline.py and test_lineage.py.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from qvgen.params import load_params
from stages.record.journal import Journal
from stages.runtime.dvc import DvcFacts
from stages.runtime.run import Stage

TO_PACK = ("fetch", "prepare", "calibrate", "qat", "decay", "pack")


def run_stages(folder: Path, *names: str) -> None:
    """Run stages in a folder whose params.yaml and data are there. Nothing is sent to a tracking server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in names:
            journal = Journal.create(folder, name, "in-process", tags={}, params={})
            facts = DvcFacts(name, "", {}, {}, ())
            stage = Stage(name, load_params(folder / "params.yaml"), folder, folder, facts, journal)
            import_module(f"stages.{name}").run(stage)
            journal.end("FINISHED")
