"""One case: one method at one bit width with one seed, from calibration to the scores of the packed model.

The same code as the pipeline's stages calibrate, qat, decay, pack, evaluate and benchmark, in one process, so that a hundred
cases do not load the libraries six hundred times. Reads artifacts/model, artifacts/data and comparison/artifacts/reference;
writes comparison/results/<case>.json. A tuning case is scored on the calibration clips instead: the held-out scores must not
be chosen by themselves.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparison.cases import CLIPS, REFERENCE, RESULTS, Case, read_settings, reference_params
from comparison.store import save_clips, short, shortened, thinned, write_result
from qvgen.training.recipe import Sources, build_trainer, calibrate, finish
from stages.runtime.run import Stage

if TYPE_CHECKING:
    from qvgen.params import Params
    from qvgen.training.loop import StepRecord, Trainer

SPECTRUM_EVERY = 10  # steps between two looks at the singular values of Φ
SMALL = 0.5  # a singular value below this share of the largest counts as small: none of 16 falls far below (LOG.md)
ERROR_CLIPS = 16
TUNING_CLIPS, TUNING_PROMPTS = 64, 40
STEP_REPETITIONS = 15
LAST = 50  # steps averaged into the final loss


def measure(stage: Stage, case: Case, factor: float, made: Mapping[str, Any]) -> None:
    """Run `case` with the parameters of `stage` and write its result; `factor` is that of the learning rate, `made` goes
    into the file as it is."""
    params = stage.params
    with tempfile.TemporaryDirectory(dir=stage.checkpoint_dir) as temporary:
        sources = Sources.of(stage.root, calibration=Path(temporary) / "calibration")
        started = time.perf_counter()
        calibrate(params, sources)
        seconds = time.perf_counter() - started
        curve: list[dict[str, float]] = []
        spectrum: dict[str, Any] = {"limit": SMALL, "step": [], "rank": [], "share_small": [], "values": []}
        with stage.progress(params.schedule.total_steps) as progress:

            def on_step(trainer: Trainer, record: StepRecord) -> None:
                curve.append(record.as_dict())
                if record.rank and record.step % SPECTRUM_EVERY == 0:
                    add_spectrum(spectrum, trainer, record)
                progress.update()

            trainer, student = train(params, sources, on_step)
        scores = {
            "case": case.name,
            "group": case.group,
            "variant": case.variant,
            "method": case.method,
            "bits": case.bits,
            "seed": case.seed,
            "learning_rate_factor": factor,
            "calibration_seconds": seconds,
            **training_scores(curve),
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,  # Linux counts in kB
            "zero_inference_cost": params.chosen.zero_inference_cost,
        }
        if case.percent is not None:
            scores |= tuning_scores(trainer, student, sources, params)
        else:
            scores["layer_error"] = layer_errors(trainer, student, sources, params)
            scores |= packed_scores(stage, case, student, params, sources, Path(temporary))
    result: dict[str, Mapping[str, Any]] = {"made": made, "scores": shortened(scores)}
    if case.group in ("main", "low"):  # the report shows no others
        result |= {"curve": thinned(curve)} if curve else {}
        result |= {"spectrum": spectrum} if spectrum["step"] else {}
    write_result(stage.root / RESULTS / f"{case.name}.json", result)
    stage.log_metrics({k: v for k, v in scores.items() if isinstance(v, int | float) and not isinstance(v, bool)})
    stage.log_tags({"method": case.method, "bits": case.bits, "seed": str(case.seed), "variant": case.variant})


def train(params: Params, sources: Sources, on_step: Callable[[Trainer, StepRecord], None]) -> tuple[Trainer, Any]:
    """The trained trainer and its student, ready for `convert_`, of a calibration that is done."""
    trainer = build_trainer(params, sources)
    trainer.run(params.schedule.total_steps, on_step)
    return trainer, finish(trainer, params, sources)


def add_spectrum(spectrum: dict[str, Any], trainer: Trainer, record: StepRecord) -> None:
    """What has become of the singular values of Φ: over the largest, means over the layers."""
    import torch

    from qvgen.nn.swap import qat_layers

    found = [layer.phi.singular_values() for _, layer in qat_layers(trainer.student) if layer.phi is not None]
    relative = [values / values[0].clamp(min=1e-30) for values in found]
    # Layers too small for the rank have fewer values.
    length = max(map(len, relative))
    padded = torch.stack([torch.nn.functional.pad(values, (0, length - len(values))) for values in relative])
    spectrum["step"].append(record.step)
    spectrum["rank"].append(record.rank)
    spectrum["share_small"].append(float((padded < SMALL).float().mean()))
    spectrum["values"].append([round(float(v), 5) for v in padded.mean(0)])


def training_scores(curve: list[dict[str, float]]) -> dict[str, Any]:
    if not curve:
        return {"steps": 0, "train_seconds": 0.0, "final_loss": None, "mean_gradient_norm": None}
    last = curve[-LAST:]
    return {
        "steps": len(curve),
        "train_seconds": sum(row["seconds"] for row in curve),
        "final_loss": sum(row["loss"] for row in last) / len(last),
        "mean_gradient_norm": sum(row["gradient_norm"] for row in curve) / len(curve),
    }


def tuning_scores(trainer: Trainer, student: Any, sources: Sources, params: Params) -> dict[str, float]:
    """How near the packed student comes to the teacher on calibration clips: {"tuning_velocity_mse", "tuning_psnr_db"}."""
    from qvgen.checkpoint.pipeline import load_pipeline
    from qvgen.data.latents import LatentDataset
    from qvgen.device import resolve_device
    from qvgen.evaluation.quality.trial import Trial, compare, observe
    from qvgen.nn.swap import convert_

    trial = Trial.from_params(params, LatentDataset.open(sources.data / "calibration"))
    trial = replace(
        trial,
        prompts=trial.prompts[:TUNING_PROMPTS],
        seeds=trial.seeds[:TUNING_PROMPTS],
        latents=trial.latents[:TUNING_CLIPS],
        text=trial.text[:TUNING_CLIPS],
    )
    device = resolve_device(params.compute.device)
    reference, candidate = (load_pipeline(sources.model, device=device) for _ in range(2))
    convert_(student)
    candidate.transformer = student
    seen = observe(candidate, trainer.family, trial, params.chosen.guidance_stop)
    scores = compare(observe(reference, trainer.family, trial), seen, trial)
    return {f"tuning_{measure}": scores[measure] for measure in ("velocity_mse", "psnr_db")}


def layer_errors(trainer: Trainer, student: Any, sources: Sources, params: Params) -> dict[str, float]:
    import torch

    from qvgen.data.latents import LatentDataset
    from qvgen.evaluation.quality.modules import module_errors
    from qvgen.nn.swap import qat_layers
    from qvgen.sampling.velocities import spread_timesteps

    data = LatentDataset.open(sources.data / "held_out")
    index = torch.arange(min(ERROR_CLIPS, len(data)))
    timesteps = torch.tensor(spread_timesteps(len(index)))
    layers = [name for name, _ in qat_layers(student)]
    found = data.latents[index], data.text(index), timesteps
    errors = module_errors(trainer.teacher, student, trainer.family, *found, layers, seed=0)
    return {layer: short(error, 4) for layer, error in errors.items()}


def packed_scores(stage: Stage, case: Case, student: Any, params: Params, sources: Sources, temporary: Path) -> dict[str, Any]:
    """Pack, load, and put the packed model to the trial; its step is timed in turn with full precision's. Clips are kept of
    the first seed only."""
    import torch

    from qvgen.checkpoint.packed import export_pipeline
    from qvgen.checkpoint.pipeline import load_pipeline
    from qvgen.data.latents import LatentDataset
    from qvgen.device import synchronize
    from qvgen.evaluation.cost.speed import interleaved
    from qvgen.evaluation.quality.similarity import psnr_db
    from qvgen.evaluation.quality.trial import Trial, compare, load_observation, observe, velocity_mse
    from qvgen.models.registry import load_family
    from qvgen.nn.swap import convert_

    convert_(student)
    folder = temporary / "packed"
    export_pipeline(sources.model, student, params.effective_scheme, folder, getattr(torch, params.pack.dtype), params.method)
    trial = Trial.from_params(reference_params(stage.root), LatentDataset.open(sources.data / "held_out"))
    prompts = params.evaluate.prompts
    trial = replace(trial, prompts=trial.prompts[:prompts], seeds=trial.seeds[:prompts])
    reference = load_observation(stage.root / REFERENCE / "reference.safetensors")
    reference = replace(reference, latents=reference.latents[:prompts], clips=reference.clips[:prompts])
    device = stage.device
    family, pipeline = load_family(folder), load_pipeline(folder, device=device)
    started = time.perf_counter()
    with stage.progress(trial.predictions, unit="prediction") as progress:
        seen = observe(pipeline, family, trial, params.chosen.guidance_stop, on_batch=progress.update)
    seconds = time.perf_counter() - started

    full, one = load_pipeline(sources.model, device=device), torch.tensor([500.0], device=device)
    latents, text = trial.latents[:1].to(device), trial.text[:1].to(device)

    @torch.no_grad()
    def predict(model: Any) -> None:
        family.predict(model, latents, one, text)
        synchronize(device)

    steps = {name: partial(predict, model) for name, model in (("packed", pipeline.transformer), ("fp32", full.transformer))}
    timings = interleaved(steps, STEP_REPETITIONS)
    settings = read_settings(stage.root)
    if case.seed == 0 and not case.variant:
        with stage.outputs(CLIPS / f"{case.name}.safetensors") as path:
            save_clips(path, seen.clips, trial.prompts, settings["clips"])
    ablated = settings["overrides"]["evaluate"]["prompts"]  # an ablation has so many, and is held against the same ones
    return {
        **compare(reference, seen, trial),
        "prompts": prompts,
        "bytes": sum(f.stat().st_size for f in (folder / "transformer").rglob("*") if f.is_file()),
        "step_ms": 1e3 * timings["packed"].median,
        "step_ms_fp32": 1e3 * timings["fp32"].median,
        "evaluation_seconds": seconds,
        "velocity_mse_by_timestep": {
            str(timestep): short(error, 4)
            for timestep, error in zip(trial.timesteps, velocity_mse(reference, seen), strict=True)
        },
        "psnr_db_by_prompt": [round(float(value), 2) for value in psnr_db(reference.clips, seen.clips)[:ablated]],
    }
