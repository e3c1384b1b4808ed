"""Stage baselines: the quality of the same scheme without training, which training has to beat.

rtn rounds on whole ranges, mse uses the calibrated grids; both are packed and judged exactly as stage evaluate judges the
trained model. Reads artifacts/model, artifacts/calibration, artifacts/data/held_out; writes metrics/baselines.json. An
interrupted run goes on, and processes share the work, as in stage evaluate.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

from stages.runtime.run import Stage, stage_main


def run(stage: Stage) -> None:
    from qvgen.checkpoint.grids import load_grids
    from qvgen.checkpoint.pipeline import PipelineFolder
    from qvgen.data.latents import LatentDataset
    from qvgen.evaluation.quality.trial import Trial, answer, collect, compare
    from qvgen.models.noise import check_told
    from qvgen.models.registry import load_family
    from qvgen.nn.swap import convert_, prepare_

    params, source = stage.params, stage.root / "artifacts/model"
    family = load_family(source)
    trial = Trial.from_params(params, LatentDataset.open(stage.root / "artifacts/data/held_out"), family)
    calibration = stage.root / "artifacts/calibration"
    own = calibration / "mse.safetensors"  # where the pipeline's method calibrates in another way
    grids = load_grids(own if own.exists() else calibration / "grids.safetensors")
    check_told(family, trial.guidance_scale)
    starts = {"rtn": None, "mse": grids}  # None: whole ranges

    def quantize_(transformer: Any, method: str) -> None:
        prepare_(transformer, params.scheme_of(method), default_targets=family.default_targets, grids=starts[method])
        convert_(transformer)

    full = PipelineFolder(source, stage.device, tiling=params.prepare.vae_tiling)
    models = {"model": full} | {method: replace(full, change_=partial(quantize_, method=method)) for method in starts}
    stores = {name: stage.checkpoint_dir / name for name in models}
    with stage.progress(len(models) * trial.predictions, unit="prediction") as progress:
        answers = {
            name: answer(
                model,
                family,
                trial,
                on_batch=progress.update,
                store=stores[name],
                share=stage.share,
                on_found=progress.skip,
            )
            for name, model in models.items()
        }
    if not stage.share.is_main:
        return
    reference = collect(answers["model"], full, family, trial, stores["model"])
    scores = {}
    for method in starts:
        seen = collect(answers[method], full, family, trial, stores[method])  # the VAE is everyone's
        scores[method] = compare(reference, seen, trial)
    with stage.outputs("metrics/baselines.json") as path:
        path.write_text(json.dumps(scores, indent=2) + "\n")
    stage.log_metrics({f"{method}.{k}": v for method, values in scores.items() for k, v in values.items()})


if __name__ == "__main__":
    stage_main("baselines", run, shared=True)
