"""Stage calibrate: search weight grids and activation clips; tell which layers quantization hurts most.

Reads artifacts/model and artifacts/data/calibration; writes artifacts/calibration/grids.safetensors, the error of every
layer with and without the search in metrics/calibrate.csv, and its summary in metrics/calibrate.json. If the method has a
calibration of its own, the plain search is written too, as mse.safetensors, for stage baselines.
"""

from __future__ import annotations

import csv
import json

from stages.runtime.run import Stage, stage_main

AT_RISK = 5  # layers named in the summary


def run(stage: Stage) -> None:
    from qvgen.checkpoint.grids import save_folds, save_grids
    from qvgen.checkpoint.pipeline import load_transformer
    from qvgen.data.latents import LatentDataset
    from qvgen.methods.registry import METHODS
    from qvgen.models.registry import load_family
    from qvgen.nn.targets import match_linears
    from qvgen.quant.calibrate import LayerGrid, layer_error
    from qvgen.training.calibration import fold_inputs_, record_inputs, search_grids

    params, method, plain = stage.params, stage.params.chosen, METHODS["mse"]
    scheme, settings = params.effective_scheme, params.calibrate
    source = stage.root / "artifacts/model"
    transformer, family = load_transformer(source).float(), load_family(source)
    names = match_linears(transformer, scheme.targets, scheme.ignore, family.default_targets)
    data = LatentDataset.open(stage.root / "artifacts/data/calibration")
    with stage.progress(len(data), "inputs", unit="clip") as progress:
        groups, seed = scheme.timestep_groups, params.seed
        inputs = record_inputs(transformer, family, data, names, groups, settings, seed, progress.update)

    # A method that starts elsewhere leaves the plain search to the stage baselines.
    own = method.folded or method.calibration != plain.calibration
    with stage.progress(len(names) * (1 + own), "layers", unit="layer") as progress:
        files = {}
        if own:
            files["mse"] = search_grids(transformer, inputs, plain, params.scheme_of("mse"), settings, progress.update)
        folds = fold_inputs_(transformer, family, inputs) if method.folded else {}
        files["grids"] = search_grids(transformer, inputs, method, scheme, settings, progress.update)

    rows = []
    for name, grid in files["grids"].items():
        layer = transformer.get_submodule(name)
        error = layer_error(layer, grid, inputs[name], scheme)
        whole = params.scheme_of("rtn")
        min_max = layer_error(layer, LayerGrid.min_max(layer.weight, whole), inputs[name], whole)
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
        for file, grids in files.items():
            save_grids(folder / f"{file}.safetensors", grids)
        save_folds(folder / "folds.safetensors", folds)
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
