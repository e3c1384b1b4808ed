"""What `qvgen push` adds to the model card of a project's own packed model: its measurements, and which recorded run made it.

The card in the folder is written by stage pack, before anything is measured, and is part of what is hashed.
"""

from __future__ import annotations

import json
from pathlib import Path


def measured_in_project(folder: Path) -> str:
    """Markdown; empty for a folder that is not this project's artifacts/packed, and where nothing was measured."""
    from pipelines.commands.results import markdown_table, read_metrics
    from pipelines.run.checkout import project_root

    try:
        root = project_root()
    except ValueError:
        return ""
    if folder.resolve() != (root / "artifacts/packed").resolve() or not read_metrics(root):
        return ""
    parts = ["## Measured", markdown_table(root)]
    registered = root / "metrics/register.json"
    if registered.is_file():
        found = json.loads(registered.read_text())
        parts.append(f"Recorded in MLflow as version {found['version']} of {found['name']}, run {found['run_id']}.")
    return "\n\n".join(parts)
