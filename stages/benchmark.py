"""Stage benchmark: latency, memory and bytes of the full-precision, the bfloat16 and the packed transformer.

Reads artifacts/model, artifacts/packed and artifacts/data; writes metrics/benchmark.json, and artifacts/benchmark with the
quartiles and the hardware. The fp32 and bf16 variants are written for the occasion, so that bytes are bytes of files.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from stages._run import Stage, stage_main

# Of the parameters that are not packed. A packed folder is loaded as everywhere else: float32 around the packed layers.
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "packed": "float32"}


def run(stage: Stage) -> None:
    from qvgen.evaluation.hardware import describe, hardware
    from qvgen.evaluation.size import folder_bytes
    from qvgen.evaluation.speed import interleaved, peak_memory_mb, torch_threads

    settings = stage.params.benchmark
    with tempfile.TemporaryDirectory(dir=stage.checkpoint_dir) as temporary, torch_threads(settings.threads):
        folders = write_variants(stage, Path(temporary))
        inputs = write_inputs(stage, Path(temporary) / "inputs.safetensors")
        sizes = {name: folder_bytes(folder / "transformer") for name, folder in folders.items()}
        with stage.progress(total=len(folders), desc="memory", unit="variant") as progress:
            memory = {}
            for name, folder in folders.items():
                memory[name] = peak_memory_mb(folder, inputs, DTYPES[name], settings.threads)
                progress.update()
        steps, videos = actions(stage, folders, inputs)
        with stage.progress(total=2 * (settings.repetitions + 2), desc="latency", unit="round") as progress:
            step_s = interleaved(steps, settings.repetitions, on_round=progress.update)
            video_s = interleaved(videos, settings.repetitions, on_round=progress.update)
        device = hardware()

    step_ms = {name: 1e3 * timing.median for name, timing in step_s.items()}
    metrics: dict[str, Any] = {
        "bytes": sizes,
        "step_ms": step_ms,
        "peak_rss_mb": {name: peak["peak"] for name, peak in memory.items()},
        "kernel": kernel_name(stage),
        "device": describe(device),
        "video_s": {name: timing.median for name, timing in video_s.items()},
        "speedup": {f"over_{name}": step_ms[name] / step_ms["packed"] for name in ("fp32", "bf16")},
    }
    if (ratio := packed_ratio(stage)) is not None:
        metrics["bytes_ratio_wan2.1_1.3b"] = ratio
    details = {
        "hardware": device,
        "batch_size": settings.batch_size,
        "inference_steps": stage.params.evaluate.inference_steps,
        "step_s": {name: timing.as_dict() for name, timing in step_s.items()},
        "video_s": {name: timing.as_dict() for name, timing in video_s.items()},
        "peak_memory_mb": memory,
    }
    with stage.outputs("artifacts/benchmark") as folder:
        (folder / "details.json").write_text(json.dumps(details, indent=2) + "\n")
    with stage.outputs("metrics/benchmark.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n")

    for name in ("bytes", "step_ms", "peak_rss_mb", "video_s", "speedup"):
        stage.log_metrics({f"{name}.{variant}": value for variant, value in metrics[name].items()})
    stage.log_artifact("metrics/benchmark.json")
    stage.log_artifact("artifacts/benchmark")


def write_variants(stage: Stage, folder: Path) -> dict[str, Path]:
    """Pipeline folders: artifacts/model in float32 and in bfloat16, and artifacts/packed itself."""
    import torch

    from qvgen.evaluation.size import write_variant

    for name in ("fp32", "bf16"):
        write_variant(stage.root / "artifacts/model", folder / name, getattr(torch, DTYPES[name]))
    return {"fp32": folder / "fp32", "bf16": folder / "bf16", "packed": stage.root / "artifacts/packed"}


def write_inputs(stage: Stage, path: Path) -> Path:
    """One batch in the middle of denoising, from the held-out data."""
    import torch
    from safetensors.torch import save_file

    from qvgen.data.precompute import LatentDataset

    data = LatentDataset.open(stage.root / "artifacts/data/held_out")
    index = torch.arange(stage.params.benchmark.batch_size) % len(data)
    timestep = torch.full((len(index),), 500.0)
    save_file({"latents": data.latents[index], "timestep": timestep, "text": data.text(index)}, path)
    return path


def actions(stage: Stage, folders: dict[str, Path], inputs: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Per variant a function that takes one denoising step, and one that makes one batch of videos, decoding included."""
    import torch
    from safetensors.torch import load_file

    from qvgen.evaluation.samples import sample
    from qvgen.evaluation.speed import load_variant
    from qvgen.models.family import ClipSize, load_family

    tensors, prepare, evaluate = load_file(inputs), stage.params.prepare, stage.params.evaluate
    size = ClipSize(prepare.frames, prepare.height, prepare.width, prepare.max_sequence_length)
    count = stage.params.benchmark.batch_size

    def of_variant(name: str, folder: Path) -> tuple[Any, Any]:
        pipeline, family = load_variant(folder, getattr(torch, DTYPES[name])), load_family(folder)
        dtype = pipeline.transformer.dtype
        latents, text = tensors["latents"].to(dtype), tensors["text"].to(dtype)

        @torch.no_grad()
        def step() -> None:
            family.predict(pipeline.transformer, latents, tensors["timestep"], text)

        def video() -> None:
            sample(
                pipeline,
                family,
                ["a red digit three moving up"] * count,
                list(range(count)),
                size,
                inference_steps=evaluate.inference_steps,
                guidance_scale=evaluate.guidance_scale,
                batch_size=count,
            )

        return step, video

    pairs = {name: of_variant(name, folder) for name, folder in folders.items()}
    return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}


def packed_ratio(stage: Stage) -> float | None:
    """What the scheme makes of Wan 2.1 1.3B; None for a scheme that names layers which that model does not have."""
    from qvgen.evaluation.size import wan_packed_ratio
    from qvgen.models.wan import WanFamily

    try:
        return wan_packed_ratio(stage.params.scheme, WanFamily.default_targets)
    except ValueError:
        return None


if __name__ == "__main__":
    stage_main("benchmark", run)
