"""Stage calibrate: search weight grids and activation clips; tell which layers quantization hurts most.

Reads artifacts/model and artifacts/data/calibration; writes artifacts/calibration/grids.safetensors, the error of every
layer with and without the search in metrics/calibrate.csv, and its summary in metrics/calibrate.json. If the method has a
calibration of its own, the plain search is written too, as mse.safetensors, for stage baselines.
"""

from __future__ import annotations

import csv
import json

from stages._run import Stage, stage_main

AT_RISK = 5  # layers named in the summary


def run(stage: Stage) -> None:
    from qvgen.checkpoint.grids import save_grids
    from qvgen.data.precompute import LatentDataset
    from qvgen.methods.registry import METHODS
    from qvgen.models.family import load_family, load_pipeline
    from qvgen.nn.targets import match_linears
    from qvgen.quant.calibrate import LayerGrid, layer_error

    method, scheme, plain = stage.params.chosen, stage.params.effective_scheme, stage.params.scheme_of("mse")
    settings = stage.params.calibrate.model_dump(include={"weight_candidates", "mse_exponent", "clip_candidates"})
    # A method with min/max grids is calibrated for the baselines' sake, and to know which layers are at risk.
    searches = {"grids": (method.calibrate, scheme)}
    if method.calibrate is not METHODS["mse"].calibrate:
        searches["mse"] = (METHODS["mse"].calibrate, plain)
    source = stage.root / "artifacts/model"
    transformer, family = load_pipeline(source).transformer.float(), load_family(source)
    names = match_linears(transformer, scheme.targets, scheme.ignore, family.default_targets)
    layers = {name: transformer.get_submodule(name) for name in names}
    data = LatentDataset.open(stage.root / "artifacts/data/calibration")
    recorder = record_inputs(stage, transformer, layers, family, data)

    grids, rows = {file: {} for file in searches}, []
    with stage.progress(len(layers), "layers", unit="layer") as progress:
        for name, layer in layers.items():
            inputs = [recorder.inputs(name, group) for group in range(scheme.timestep_groups)]
            for file, (calibrate, used) in searches.items():
                grids[file][name] = calibrate(layer, inputs, used, **settings)
            grid = grids["grids"][name]
            error = layer_error(layer, grid, inputs, scheme)
            min_max = layer_error(layer, LayerGrid.min_max(layer.weight, plain), inputs, plain)
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
            progress.update()
    rows.sort(key=lambda row: -row["output_error"])
    summary = {
        "layers": len(rows),
        "mean_output_error": sum(row["output_error"] for row in rows) / len(rows),
        "mean_output_error_min_max": sum(row["output_error_min_max"] for row in rows) / len(rows),
        "most_at_risk": {row["layer"]: row["output_error"] for row in rows[:AT_RISK]},
    }
    with stage.outputs("artifacts/calibration") as folder:
        for file, layer_grids in grids.items():
            save_grids(folder / f"{file}.safetensors", layer_grids)
    with stage.outputs("metrics/calibrate.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with stage.outputs("metrics/calibrate.json") as path:
        path.write_text(json.dumps(summary, indent=2) + "\n")
    stage.log_metrics({k: v for k, v in summary.items() if not isinstance(v, dict)})
    stage.log_artifact("metrics/calibrate.csv")
    print(f"layers most at risk ({scheme.name}): " + ", ".join(f"{k} {v:.3f}" for k, v in summary["most_at_risk"].items()))


def record_inputs(stage, transformer, layers, family, data):
    """Run the full-precision model over the calibration clips, sample i at a random timestep of group i mod G."""
    import torch

    from qvgen.models.family import NUM_TRAIN_TIMESTEPS
    from qvgen.quant.calibrate import InputRecorder
    from qvgen.quant.primitives import timestep_group

    groups = stage.params.scheme.timestep_groups
    settings, seed = stage.params.calibrate, stage.params.seed
    generator = torch.Generator().manual_seed(seed)
    recorder = InputRecorder(groups, settings.tokens_per_group, seed)
    with (
        torch.no_grad(),
        recorder.attached(layers),
        stage.progress(len(data), "inputs", unit="clip") as progress,
    ):
        for index in torch.arange(len(data)).split(settings.batch_size):
            clean, text = data.batch(index, 0.0, generator)
            within = torch.rand(len(index), generator=generator)
            # Whole timesteps: families with discrete noise levels have no others.
            timestep = torch.floor((index % groups + within) * NUM_TRAIN_TIMESTEPS / groups)
            noisy = family.add_noise(clean, torch.randn(clean.shape, generator=generator), timestep)
            recorder.group = timestep_group(timestep, groups, NUM_TRAIN_TIMESTEPS)
            family.predict(transformer, noisy, timestep, text)
            progress.update(len(index))
    return recorder


if __name__ == "__main__":
    stage_main("calibrate", run)
