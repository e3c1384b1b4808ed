"""Results of one run as files that a report reads: numbers, curves, and a few clips."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch


def save_clips(folder: Path, clips: torch.Tensor, prompts: Sequence[str], count: int) -> None:
    """clips.safetensors (uint8, `count` of the clips (n, 3, t, h, w) in [-1, 1], evenly spread) and clips.json."""
    from qvgen.tensors import save_tensors

    chosen = [i * len(prompts) // count for i in range(count)]
    pixels = ((clips[chosen].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    save_tensors(folder / "clips.safetensors", {"clips": pixels})
    (folder / "clips.json").write_text(json.dumps([prompts[i] for i in chosen], indent=0, ensure_ascii=False) + "\n")


def save_curve(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """A row per training step, six digits: enough to draw, and a third of the size."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, int) else f"{v:.6g}" for k, v in row.items()} for row in rows)
