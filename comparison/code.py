"""Stage compare_code: what a case of the comparison depends on in the code, as a few hashes in comparison/code.json.

A hundred and eighty stages need not list two dozen paths each, all of which DVC would read whenever anything of the project is
run; and a new method, or an edit to one, makes no case of another method run again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from comparison.cases import FOLDER
from qvgen.methods.registry import METHODS
from stages.runtime.dvc import fingerprint
from stages.runtime.run import Stage, stage_main

FOLDER_OF_METHODS = "qvgen/methods"


def run(stage: Stage) -> None:
    own = f"comparison/{Path(__file__).name}"
    shared = {path: md5 for path, md5 in stage.facts.deps.items() if path not in (own, FOLDER_OF_METHODS)}
    methods = stage.root / FOLDER_OF_METHODS
    code = {
        "shared": fingerprint([shared, _sha256(methods / "method.py")]),
        # What the registry says of a method, and its module.
        "methods": {
            name: fingerprint([asdict(method), _sha256(methods / f"{name.replace('+', '_plus')}.py")])
            for name, method in sorted(METHODS.items())
        },
    }
    with stage.outputs(FOLDER / "code.json") as path:
        path.write_text(json.dumps(code, indent=2) + "\n")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    stage_main("compare_code", run)
