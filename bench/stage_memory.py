"""`python -m bench.stage_memory`: the peak resident memory of each stage on a model of true width, against a budget.

Writes a pipeline folder of a published model's width with few layers (true_width.py), videos, and a project around them. `dvc
repro` runs every stage once, in a process of its own, and each prints its peak (VmHWM).

A budget is what the stage has to hold at one time: `imports`, measured, plus these parts. P, T, V: bytes of the transformer in
float32, of the text encoder and of the VAE as they are stored.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.true_width import PUBLISHED, write_model

ROOT = Path(__file__).resolve().parents[1]
CLIP = {"frames": 9, "height": 64, "width": 96}
TOKENS = 226  # of text: CogVideoX 2B takes no other number
WORK = 400e6  # bytes that any stage may compute with: activations of small clips, one layer's search, buffers of files
IMPORTS = "import torch, diffusers, transformers; from diffusers import WanPipeline; from transformers import UMT5EncoderModel"
_PEAK = re.compile(r"^(\w+): .*peak (\d+) MB resident", re.MULTILINE)

# Stage -> bytes besides imports and WORK, of P, T and V, and what they are.
Budget = tuple[Callable[[float, float, float], float], str]
BUDGETS: dict[str, Budget] = {
    "fetch": (lambda p, t, v: 0.0, "nothing"),
    "prepare": (lambda p, t, v: max(t, v), "text encoder, then VAE"),
    "calibrate": (lambda p, t, v: 2 * p, "transformer, and the recorded inputs of its layers"),
    "baselines": (lambda p, t, v: max(t, v, 2 * p), "one model at a time; while it is quantized, the transformer twice"),
    "qat": (
        lambda p, t, v: 9 * p,
        "teacher, student, gradients, two moments; four more to compute with",
    ),
    "decay": (lambda p, t, v: 9 * p, "the same, and the state of qat while it is read"),
    "pack": (lambda p, t, v: 3 * p, "student, its weights as they were trained, its packed weights"),
    "evaluate": (lambda p, t, v: max(t, v, p), "one model at a time"),
    "benchmark": (
        lambda p, t, v: 2 * p + 3 * t + v,
        "three transformers, timed in turn; text encoders in float32 and bfloat16, one VAE",
    ),
    "register": (lambda p, t, v: 0.0, "nothing"),
}


def write_project(folder: Path) -> None:
    """Stages, parameters and ten videos; `folder`/model is there."""
    import torch
    import yaml

    from qvgen.sampling.video import write_video

    for name in ("stages", "qvgen"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", folder)
    (folder / "assets/tiny-wan").mkdir(parents=True)
    (folder / "assets/tiny-wan/sha256.json").write_text("{}")  # dvc.yaml names it, for the embedded model
    (folder / "videos").mkdir()
    rows = [("file", "caption")]
    for i in range(10):
        write_video(folder / f"videos/{i}.mp4", torch.rand(3, 9, 64, 96) * 2 - 1)
        rows.append((f"{i}.mp4", f"a red digit {'one' if i % 2 else 'two'} moving up"))
    with (folder / "videos/captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    parts = {"train_clips": 5, "calibration_clips": 3, "held_out_clips": 2, "batch_size": 1, "dtype": "bfloat16"}
    changes: dict[str, Any] = {
        "fetch": {"source": "model"},
        "prepare": {"source": "videos", "folder": "videos", "fps": "native", **CLIP, "max_sequence_length": TOKENS, **parts},
        "scheme": {"timestep_groups": 3},
        "calibrate": {"batch_size": 1, "weight_candidates": 4, "clip_candidates": [0.95, 0.8], "tokens_per_group": 64},
        "qat": {"steps": 2, "batch_size": 2, "checkpoint_every": 1},
        "decay": {"initial_rank": 4, "phase_steps": 1, "final_steps": 1},
        "evaluate": {"prompts": 2, "inference_steps": 2, "velocity_timesteps": 2, "videos": 1, "batch_size": 1},
        "benchmark": {"repetitions": 3},
        "compute": {"processes": 1, "micro_batch": 1, "checkpointing": True},
    }
    for section, values in changes.items():
        tree[section] |= values
    (folder / "params.yaml").write_text(yaml.safe_dump(tree))


def run(folder: Path) -> dict[str, float]:
    """Stage -> peak resident bytes."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "QVGEN_", "DVC_"))}
    variables |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), "PYTHONPATH": str(folder)}
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=folder, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"],
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"dvc repro failed:\n{done.stdout[-5000:]}")
    return {stage: 1e6 * float(peak) for stage, peak in _PEAK.findall(done.stdout)}


def imports() -> float:
    command = f"{IMPORTS}; from qvgen.device import peak_resident_mb; print(peak_resident_mb())"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return 1e6 * float(done.stdout)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.stage_memory", description="peak memory of each stage")
    parser.add_argument("--model", choices=PUBLISHED, default="wan2.1-1.3b", help="whose width; default wan2.1-1.3b")
    parser.add_argument("--layers", type=int, default=2, help="of the transformer; default 2")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = write_model(folder / "model", options.model, options.layers)
        write_project(folder)
        base, peaks = imports(), run(folder)
    rows, over = [], 0
    for stage, (parts, what) in BUDGETS.items():
        budget, peak = base + WORK + parts(*sizes.values()), peaks[stage]
        over += peak > budget
        rows.append({"stage": stage, "peak_mb": round(peak / 1e6), "budget_mb": round(budget / 1e6), "holds": what})
    print(", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in {**sizes, "imports": base}.items()))
    print("\n| stage | peak, MB | budget, MB | what it holds |\n|---|---|---|---|")
    for row in rows:
        print(f"| `{row['stage']}` | {row['peak_mb']} | {row['budget_mb']} | {row['holds']} |")
    if options.json:
        content = {"model": options.model, "layers": options.layers, "bytes": {**sizes, "imports": base}, "stages": rows}
        Path(options.json).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
