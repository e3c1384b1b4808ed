"""The answers of the full-precision model, computed once for all cases.

Reads artifacts/model and artifacts/data; writes comparison/artifacts/reference, which git does not keep and only a case that
runs needs, and for the report comparison/results/full_precision.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comparison.cases import CLIPS, FULL_PRECISION, REFERENCE, RESULTS, read_settings
from comparison.store import differences, save_clips, write_result
from stages.runtime.run import Stage

MADE = REFERENCE / "made.json"


def is_stale(root: Path, made: Mapping[str, Any]) -> bool:
    """Whether comparison/artifacts/reference is absent or was made from something else."""
    return not (root / MADE).is_file() or bool(differences(json.loads((root / MADE).read_text()), made))


def measure_reference(stage: Stage, made: Mapping[str, Any]) -> None:
    from qvgen.checkpoint.pipeline import load_pipeline
    from qvgen.data.latents import LatentDataset
    from qvgen.evaluation.quality.trial import Trial, movement, observe, prompt_accuracy
    from qvgen.models.registry import load_family
    from qvgen.tensors import save_tensors

    source = stage.root / "artifacts/model"
    trial = Trial.from_params(stage.params, LatentDataset.open(stage.root / "artifacts/data/held_out"))
    with stage.progress(trial.predictions, unit="prediction") as progress:
        seen = observe(load_pipeline(source, device=stage.device), load_family(source), trial, on_batch=progress.update)
    scores = {
        "case": FULL_PRECISION,
        "group": "reference",
        "variant": "",
        "method": "full precision",
        "bits": "W32A32",
        "seed": 0,
        **prompt_accuracy(seen, trial),
        **movement(seen),
        "bytes": sum(f.stat().st_size for f in (source / "transformer").rglob("*") if f.is_file()),
        "zero_inference_cost": True,
    }
    write_result(stage.root / RESULTS / f"{FULL_PRECISION}.json", {"made": made, "scores": scores})
    with stage.outputs(CLIPS / f"{FULL_PRECISION}.safetensors") as path:
        save_clips(path, seen.clips, trial.prompts, read_settings(stage.root)["clips"])
    with stage.outputs(REFERENCE) as folder:
        tensors = {"latents": seen.latents, "clips": seen.clips, "velocities": seen.velocities}
        save_tensors(folder / "reference.safetensors", tensors)
        (folder / MADE.name).write_text(json.dumps(made))
    stage.log_metrics({k: v for k, v in scores.items() if isinstance(v, float)})
