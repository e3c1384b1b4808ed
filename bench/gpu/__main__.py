"""`python -m bench.gpu` (`make gpu`): what only a GPU can show, on this machine's card, in one call under 9 minutes.

Tests of the kernels and of what diffusers does with a packed model, linear layers, a denoising step of each model and length,
the embedded model, a training step: each part in a process of its own with a share of the time. One that fails, or runs out of
memory or time, is reported and the others go on. Writes bench/results/gpu-<card>.json, a row per line, and the same as a
Markdown table, with the targets that are met. Without a card it says so in a line and succeeds.

Needs torch >= 2.11 and triton >= 3.6, diffusers, pytest and what these import; neither prefect, dvc nor mlflow.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.gpu.parts import PARTS, SMALLEST, run_all
from bench.gpu.table import markdown, rows_of, targets
from bench.report import write_json

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 520  # of all parts: one call stays under nine minutes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="tests and measurements on this machine's GPU")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny sizes, to see that it runs")
    parser.add_argument("--parts", default="", help=f"names, separated by commas; all: {', '.join(p.name for p in PARTS)}")
    parser.add_argument("--seconds", type=float, default=LIMIT_S, help=f"of all parts together; default {LIMIT_S}")
    parser.add_argument("--folder", type=Path, default=ROOT / "bench/results", help="where the results go")
    options = parser.parse_args(arguments)
    parts = PARTS if options.device == "cuda" else SMALLEST
    wanted = [name for name in options.parts.split(",") if name]
    if unknown := set(wanted) - {part.name for part in parts}:
        parser.error(f"no part is named {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in parts)}")
    if options.device == "cuda":
        from qvgen.kernels.triton.backend import refusal

        if reason := refusal():
            print(f"no GPU to test on: {reason}")
            # A card that is there and cannot be used is a failure; a machine without one is not.
            return 1 if torch.cuda.is_available() else 0
    card = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    print(f"on {card}, torch {torch.__version__}, at most {options.seconds:.0f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        chosen = [part for part in parts if not wanted or part.name in wanted]
        results = run_all(chosen, options.seconds, Path(folder), lambda line: print(line, flush=True))
    content = facts(card) | {"targets": targets(results), "rows": rows_of(results)}
    path = options.folder / f"gpu-{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}.json"
    write_json(path, content)
    text = markdown(content)
    path.with_suffix(".md").write_text(text)
    print(f"\n{text}\n{path}")
    return 0 if all(result.status == "ok" for result in results) else 1


def facts(card: str) -> dict[str, Any]:
    from datetime import UTC, datetime
    from importlib import metadata

    versions = {}
    for name in ("torch", "triton", "diffusers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {"card": card, "date": datetime.now(UTC).date().isoformat(), "versions": versions}


if __name__ == "__main__":
    sys.exit(main())
