"""`qvgen proxies`: weight-free measures of the videos of a folder, motion always beside consistency."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NOTE = "Proxies are no VBench scores: compare them only with each other, over the same prompts."


def measure(folder: Path) -> dict[str, Any]:
    """{"videos": {file name: scores}, "mean": scores}. Raises ValueError for a folder without videos, or a damaged one."""
    from tqdm import tqdm

    from qvgen.evaluation.quality.proxies import read_frames, scores

    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; make it with `qvgen generate --prompts`")
    paths = sorted(folder.glob("[!.]*.mp4"))
    if not paths:
        raise ValueError(f"{folder} has no .mp4 files; make some with `qvgen generate --prompts`")
    videos = {path.name: scores(*read_frames(path)) for path in tqdm(paths, unit="video", disable=not sys.stderr.isatty())}
    names = next(iter(videos.values()))
    return {"videos": videos, "mean": {name: sum(video[name] for video in videos.values()) / len(videos) for name in names}}


def show(folder: Path, as_json: bool) -> None:
    """Print the means over the videos as a table, or everything as JSON."""
    content = measure(folder)
    if as_json:
        print(json.dumps(content, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("measure", f"mean of {len(content['videos'])} videos")
    for name, value in content["mean"].items():
        table.add_row(name, f"{value:.4f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(NOTE, soft_wrap=True)
