"""Stage calibrate: search weight grids and activation clips; tell which layers quantization hurts most.

Reads artifacts/model and artifacts/data/calibration; writes artifacts/calibration/grids.safetensors, the error of every
layer with and without the search in metrics/calibrate.csv, and its summary in metrics/calibrate.json. If the method
searches in a way of its own, the grids of `mse` are written too, as mse.safetensors, for stage baselines.
"""

from __future__ import annotations

import csv
import json

from stages.runtime.run import Stage, stage_main

AT_RISK = 5  # layers named in the summary


def run(stage: Stage) -> None:
    from qvgen.checkpoint.pipeline import load_transformer
    from qvgen.data.latents import LatentDataset
    from qvgen.models.registry import load_family
    from qvgen.quant.grid import LayerGrid, layer_error
    from qvgen.training.calibration import calibrate_
    from qvgen.training.recipe import Sources, save_calibration

    params, sources = stage.params, Sources.of(stage.root)
    scheme, whole = params.effective_scheme, params.scheme_of("rtn")
    family = load_family(sources.model)
    transformer = load_transformer(sources.model, device=stage.device, component=family.component).float()
    clips = LatentDataset.open(sources.data / "calibration")
    # The plain grids are for stage baselines.
    calibration = calibrate_(transformer, family, clips, params, stage.progress, with_plain=True)

    rows = []
    for name, grid in calibration.grids.items():
        weight, inputs = transformer.get_parameter(f"{name}.weight"), calibration.inputs[name]
        error = layer_error(weight, grid, inputs, scheme)
        min_max = layer_error(weight, LayerGrid.min_max(weight, whole), inputs, whole)
        rows.append(
            {
                "layer": name,
                "weight_error": error.weight,
                "activation_error": error.activation,
                "output_error": error.output,
                "output_error_min_max": min_max.output,
                "clip_lower": "" if grid.clip_lower is None else float(grid.clip_lower.mean()),
                "clip_upper": "" if grid.clip_upper is None else float(grid.clip_upper.mean()),
            }
        )
    rows.sort(key=lambda row: -row["output_error"])
    summary = {
        "layers": len(rows),
        "mean_output_error": sum(row["output_error"] for row in rows) / len(rows),
        "mean_output_error_min_max": sum(row["output_error_min_max"] for row in rows) / len(rows),
        "most_at_risk": {row["layer"]: row["output_error"] for row in rows[:AT_RISK]},
    }
    with stage.outputs("artifacts/calibration") as folder:
        save_calibration(folder, calibration)
    with stage.outputs("metrics/calibrate.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with stage.outputs("metrics/calibrate.json") as path:
        path.write_text(json.dumps(summary, indent=2) + "\n")
    stage.log_metrics({k: v for k, v in summary.items() if not isinstance(v, dict)})
    stage.log_artifact("metrics/calibrate.csv")
    print(f"layers most at risk ({scheme.name}): " + ", ".join(f"{k} {v:.3f}" for k, v in summary["most_at_risk"].items()))


if __name__ == "__main__":
    stage_main("calibrate", run)
