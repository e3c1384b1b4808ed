"""Stage benchmark: latency, memory and bytes of the full-precision, the bfloat16 and the packed transformer.

Reads artifacts/model, artifacts/packed and a caption of artifacts/data; writes metrics/benchmark.json, and records quartiles
and hardware in the run. The fp32 and bf16 variants are written for the occasion, so that all bytes are bytes of files.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from stages.runtime.run import Stage, stage_main

# Of the parameters that are not packed. A packed folder is loaded as everywhere else: float32 around the packed layers.
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "packed": "float32"}


def run(stage: Stage) -> None:
    from qvgen.evaluation.cost.hardware import describe, hardware, kernel_name
    from qvgen.evaluation.cost.size import folder_bytes
    from qvgen.evaluation.cost.speed import interleaved, load_variant, peak_memory_mb, torch_threads
    from qvgen.models.files import trained_component

    settings, component = stage.params.benchmark, trained_component(stage.root / "artifacts/model")
    with tempfile.TemporaryDirectory(dir=stage.checkpoint_dir) as temporary, torch_threads(settings.threads):
        folders = write_variants(stage, Path(temporary))
        sizes = {name: folder_bytes(folder / component) for name, folder in folders.items()}
        pipelines: dict[str, Any] = {}
        for name, folder in folders.items():
            pipelines[name] = load_variant(folder, DTYPES[name], stage.device, pipelines.get("fp32"))
        inputs = write_inputs(stage, pipelines["fp32"], Path(temporary) / "inputs.safetensors")
        with stage.progress(total=len(folders), desc="memory", unit="variant") as progress:
            memory = {}
            for name, folder in folders.items():
                memory[name] = peak_memory_mb(folder, inputs, DTYPES[name], settings.threads, stage.device, component)
                progress.update()
        steps = {name: step_action(stage, pipeline, inputs) for name, pipeline in pipelines.items()}
        videos = {name: video_action(stage, pipeline) for name, pipeline in pipelines.items()}
        with stage.progress(total=2 * (settings.repetitions + 2), desc="latency", unit="round") as progress:
            step_s = interleaved(steps, settings.repetitions, on_round=progress.update)
            video_s = interleaved(videos, settings.repetitions, on_round=progress.update)
        device = hardware()

    step_ms = {name: 1e3 * timing.median for name, timing in step_s.items()}
    metrics: dict[str, Any] = {
        "bytes": sizes,
        "step_ms": step_ms,
        "peak_rss_mb": {name: peak["peak"] for name, peak in memory.items()},
        "kernel": kernel_name(getattr(pipelines["packed"], component)),
        "device": describe(device),
        "video_s": {name: timing.median for name, timing in video_s.items()},
        "speedup": {f"over_{name}": step_ms[name] / step_ms["packed"] for name in ("fp32", "bf16")},
    }
    metrics |= published_ratio(stage)
    details = {
        "hardware": device,
        "batch_size": settings.batch_size,
        "inference_steps": stage.params.evaluate.inference_steps,
        "step_s": {name: timing.as_dict() for name, timing in step_s.items()},
        "video_s": {name: timing.as_dict() for name, timing in video_s.items()},
        "peak_memory_mb": memory,
    }
    with stage.outputs("metrics/benchmark.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n")

    for name in ("bytes", "step_ms", "peak_rss_mb", "video_s", "speedup"):
        stage.log_metrics({f"{name}.{variant}": value for variant, value in metrics[name].items()})
    stage.log_artifact("metrics/benchmark.json")
    stage.log_text(json.dumps(details, indent=2) + "\n", "benchmark_details.json")


def write_variants(stage: Stage, folder: Path) -> dict[str, Path]:
    """Pipeline folders: artifacts/model in float32 and in bfloat16, and artifacts/packed itself."""
    from qvgen.evaluation.cost.size import write_variant
    from qvgen.models.files import trained_component

    source = stage.root / "artifacts/model"
    for name in ("fp32", "bf16"):
        write_variant(source, folder / name, DTYPES[name], trained_component(source))
    return {"fp32": folder / "fp32", "bf16": folder / "bf16", "packed": stage.root / "artifacts/packed"}


def write_inputs(stage: Stage, pipeline: Any, path: Path) -> Path:
    """Inputs of the transformer as in the middle of denoising. Their values do not change how long a step takes."""
    import torch

    from qvgen.models.registry import family_adapter
    from qvgen.tensors import save_tensors

    size, count = clip_size(stage), stage.params.benchmark.batch_size
    family = family_adapter(pipeline)
    with torch.no_grad():
        clips = torch.zeros(count, 3, size.frames, size.height, size.width)
        clean = family.encode_clips(pipeline, clips).float().cpu()
        text = family.encode_text(pipeline, [prompt(stage)] * count, size.max_sequence_length).float().cpu()
        image = family.encode_image(pipeline, clips).float().cpu()
    timestep = torch.full((count,), 500.0)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(stage.params.seed))
    latents = family.add_noise(clean, noise, timestep)
    tensors = {"latents": latents, "timestep": timestep, "text": text} | ({"image": image} if image.shape[1] else {})
    save_tensors(path, tensors)
    return path


def step_action(stage: Stage, pipeline: Any, inputs: Path) -> Any:
    """A function that calls the transformer once."""
    import torch
    from safetensors.torch import load_file

    from qvgen.device import synchronize
    from qvgen.models.registry import load_family

    device, family = stage.device, load_family(stage.root / "artifacts/model")
    transformer, tensors = getattr(pipeline, family.component), load_file(inputs, str(device))
    latents, *condition = (tensors[x].to(transformer.dtype) for x in ("latents", "text", "image") if x in tensors)

    @torch.no_grad()
    def step() -> None:
        family.predict(transformer, latents, tensors["timestep"], *condition)
        synchronize(device)

    return step


def video_action(stage: Stage, pipeline: Any) -> Any:
    """A function that makes one batch of videos: text, all denoising steps with guidance, decoding."""
    import torch

    from qvgen.models.registry import family_adapter
    from qvgen.sampling.sample import sample

    evaluate, count = stage.params.evaluate, stage.params.benchmark.batch_size
    family, size = family_adapter(pipeline), clip_size(stage)
    images = torch.full((count, 3, size.height, size.width), 128) if family.reads_image else None
    return lambda: sample(
        pipeline,
        family,
        [prompt(stage)] * count,
        list(range(count)),
        size,
        images=images,
        inference_steps=evaluate.inference_steps,
        guidance_scale=evaluate.guidance_scale,
        batch_size=count,
    )


def prompt(stage: Stage) -> str:
    """A caption of the data; any takes the same time."""
    return json.loads((stage.root / "artifacts/data/captions.json").read_text())[0]


def clip_size(stage: Stage) -> Any:
    from qvgen.models.family import ClipSize

    prepare = stage.params.prepare
    return ClipSize(prepare.frames, prepare.height, prepare.width, prepare.max_sequence_length)


def published_ratio(stage: Stage) -> dict[str, float]:
    """Size of a published model of the same family under this scheme; empty if the scheme names layers that it lacks."""
    from qvgen.evaluation.cost.size import published_packed_ratio
    from qvgen.models.registry import load_family

    family = load_family(stage.root / "artifacts/model")
    try:
        return {f"bytes_ratio_{family.published[0]}": published_packed_ratio(family, stage.params.effective_scheme)}
    except ValueError:
        return {}


if __name__ == "__main__":
    stage_main("benchmark", run)
