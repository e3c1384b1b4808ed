"""Stage compare_reference: what the full-precision model answers, once for all cases.

Reads artifacts/model and artifacts/data; writes comparison/artifacts/reference and, for the report,
comparison/results/full_precision.
"""

from __future__ import annotations

import json

from comparison.cases import FULL_PRECISION, REFERENCE, RESULTS, read_settings, reference_params
from stages.runtime.run import Stage, stage_main


def run(stage: Stage) -> None:
    from comparison.store import save_clips
    from qvgen.checkpoint.pipeline import load_pipeline
    from qvgen.data.latents import LatentDataset
    from qvgen.evaluation.quality.trial import Trial, movement, observe, prompt_accuracy
    from qvgen.models.registry import load_family
    from qvgen.tensors import save_tensors

    source = stage.root / "artifacts/model"
    trial = Trial.from_params(reference_params(stage.root), LatentDataset.open(stage.root / "artifacts/data/held_out"))
    with stage.progress(trial.items, unit="item") as progress:
        seen = observe(load_pipeline(source), load_family(source), trial, on_batch=progress.update)
    with stage.outputs(REFERENCE) as folder:
        tensors = {"latents": seen.latents, "clips": seen.clips, "velocities": seen.velocities}
        save_tensors(folder / "reference.safetensors", tensors)
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
    with stage.outputs(RESULTS / FULL_PRECISION) as folder:
        (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
        save_clips(folder, seen.clips, trial.prompts, read_settings(stage.root)["clips"])
    stage.log_metrics({k: v for k, v in scores.items() if isinstance(v, float)})


if __name__ == "__main__":
    stage_main("compare_reference", run)
