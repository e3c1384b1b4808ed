"""Stage evaluate: the packed model against the full-precision one, from the same noise.

Reads artifacts/model, artifacts/packed and artifacts/data; writes metrics/evaluate.json, and in artifacts/evaluation a
contact sheet, side-by-side videos, details.json (motion, flicker, velocity error per timestep) and canary/: videos of the
packed model by which `qvgen canary` knows it. A run that is interrupted goes on after the last whole batch; several processes
share the batches (qvgen/share.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.runtime.run import Stage, stage_main

LABELS = ("full precision", "packed")


def run(stage: Stage) -> None:
    from qvgen.checkpoint.pipeline import PipelineFolder
    from qvgen.data.latents import LatentDataset
    from qvgen.evaluation.quality.trial import (
        ACCURACIES,
        Trial,
        answer,
        collect,
        compare,
        movement,
        prompt_accuracy,
        velocity_mse,
    )
    from qvgen.models.noise import check_told
    from qvgen.models.registry import load_family
    from qvgen.models.size import check_size
    from qvgen.sampling.settings import read_guidance_stop

    folders = [stage.root / "artifacts/model", stage.root / "artifacts/packed"]
    family = load_family(folders[0])  # it knows which of two transformers was trained
    trial = Trial.from_params(stage.params, LatentDataset.open(stage.root / "artifacts/data/held_out"), family)
    for folder in folders:
        check_size(folder, trial.size)
    check_told(family, trial.guidance_scale)
    models = {folder: PipelineFolder(folder, stage.device, tiling=stage.params.prepare.vae_tiling) for folder in folders}
    stores = {folder: stage.checkpoint_dir / folder.name for folder in folders}
    with stage.progress(total=len(folders) * trial.predictions, unit="prediction") as progress:
        answers = {
            folder: answer(
                model,
                family,
                trial,
                read_guidance_stop(folder),
                progress.update,
                stores[folder],
                stage.share,
                progress.skip,
            )
            for folder, model in models.items()
        }
    if not stage.share.is_main:
        return
    observed = [collect(answers[folder], model, family, trial, stores[folder]) for folder, model in models.items()]
    reference, packed = observed

    scores = compare(reference, packed, trial)
    accuracy = prompt_accuracy(reference, trial)
    kept = [*accuracy, "psnr_db", "ssim", "velocity_mse", "latent_mse"]
    metrics: dict[str, Any] = {
        "full_precision": accuracy,
        "packed": {k: scores[k] for k in kept},
        "prompts": len(trial.prompts),
    }
    if not trial.judged:
        metrics["not_applicable"] = " ".join(ACCURACIES)  # so that the gate can tell it from what was forgotten
    details = {
        "full_precision": movement(reference),
        "packed": movement(packed),
        "velocity_mse_by_timestep": dict(zip(map(str, trial.timesteps), velocity_mse(reference, packed), strict=True)),
        "inference_steps": trial.inference_steps,
        "guidance_scale": trial.guidance_scale,
    }
    with stage.outputs("artifacts/evaluation") as folder:
        (folder / "details.json").write_text(json.dumps(details, indent=2) + "\n")
        (folder / "canary").mkdir()
        write_canary(folders[1], folder / "canary", trial)
        write_pictures(folder, stage.params.evaluate.videos, trial.prompts, [o.clips for o in observed])
    with stage.outputs("metrics/evaluate.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n")

    stage.log_metrics({f"{model}.{k}": v for model in ("full_precision", "packed") for k, v in metrics[model].items()})
    stage.log_metrics({f"{model}.{k}": v for model in ("full_precision", "packed") for k, v in details[model].items()})
    stage.log_artifact("artifacts/evaluation")
    stage.log_artifact("metrics/evaluate.json")


def write_canary(packed: Path, out: Path, trial: Any) -> None:
    """Videos of the packed model alone, evenly spread over the prompts, by which it is known where it serves."""
    import torch

    from qvgen.evaluation.quality.canary import VIDEOS, make_canary
    from qvgen.sampling.settings import read_settings

    count = min(VIDEOS, len(trial.prompts))
    chosen = [i * len(trial.prompts) // count for i in range(count)]
    overrides = {**vars(trial.size), "inference_steps": trial.inference_steps, "guidance_scale": trial.guidance_scale}
    settings = read_settings(packed, overrides)
    images = None if trial.images is None else trial.images[torch.tensor(chosen)]
    prompts, seeds = [trial.prompts[i] for i in chosen], [trial.seeds[i] for i in chosen]
    make_canary(packed, out, prompts, seeds, settings, images=images)


def write_pictures(folder: Path, count: int, prompts: tuple[str, ...], clips: list) -> None:
    """contact_sheet.png and `count` side-by-side videos named by number and prompt, evenly spread over the prompts."""
    from qvgen.sampling.video import contact_sheet, side_by_side, write_video

    chosen = [i * len(prompts) // count for i in range(count)]
    pairs = [[model[i] for model in clips] for i in chosen]
    if pairs:
        contact_sheet(folder / "contact_sheet.png", pairs, [prompts[i] for i in chosen], LABELS)
    for number, (i, pair) in enumerate(zip(chosen, pairs, strict=True)):
        name = "-".join("".join(c if c.isalnum() else " " for c in prompts[i]).split())[:80]
        write_video(folder / f"{number:02d}-{name}.mp4", side_by_side(pair, LABELS))


if __name__ == "__main__":
    stage_main("evaluate", run, shared=True)
