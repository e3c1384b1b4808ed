"""`python -m bench.dit_step`: one denoising step of a transformer, packed against full precision and bfloat16.

The transformer is diffusers', in a published architecture with `--layers` blocks and random weights, which take as long as
any others; a step has one sample, 512 text tokens (CogVideoX: 226) and `--tokens` latent tokens.

    fp32               diffusers, loaded in float32
    bf16               diffusers, loaded in bfloat16
    packed             W4A4, loaded by diffusers from a packed folder in bfloat16
    packed_unfused     the same with diffusers' own blocks around the packed layers

All are timed in turn. `step_ms` holds medians, of CPU time with one thread and of wall time with several, as in
bench/linear.py, and `speedup` the ratios of these. Memory and loading are measured in a fresh process per variant
(qvgen/evaluation/cost/speed.py), with the files in the page cache: `peak_memory_mb` is the resident memory after the imports,
its peak while loading, and the peak with one step. Files are mapped, so what is read of a file counts as resident too.

`--device cuda --frames N` is another measurement, of the GPU's time, against compiled bfloat16: bench/dit_step/gpu.py.

Embedders are not packed and weigh as much in a model of 2 layers as in one of 30: `weight_bytes` is of the whole model as
it was built here, `block_bytes` of its blocks alone, which is what the whole tends to with more layers.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.dit_step import gpu
from bench.dit_step.breakdown import breakdown_ms
from bench.dit_step.models import DTYPES, MODELS, ON_CPUS, inputs, load, memory_bytes, write_folders
from bench.gpu.timing import device_of
from bench.report import print_table, write_json
from qvgen.evaluation.cost.hardware import describe, hardware
from qvgen.evaluation.cost.size import folder_bytes
from qvgen.evaluation.cost.speed import peak_memory_mb, time_calls, timing, torch_threads
from qvgen.integrations.fused import unfuse_
from qvgen.models.family import Family
from qvgen.nn.packed_linear import packed_layers

UNFUSED = "packed_unfused"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.dit_step", description="a denoising step, packed and not")
    parser.add_argument("--device", type=device_of, help="cuda: in its own time, with --frames instead of --tokens")
    parser.add_argument("--frames", type=int, help="of a video of 480 x 832 pixels, on a GPU; 4 n + 1")
    parser.add_argument("--seconds", type=float, default=60, help="about how long to measure, on a GPU")
    parser.add_argument("--eager", action="store_true", help="nothing compiled, on a GPU")
    parser.add_argument("--model", choices=list(MODELS), default="wan2.1-1.3b")
    parser.add_argument("--tokens", type=int, default=1560, help="1560 are a frame of 480 x 832 pixels")
    parser.add_argument("--layers", type=int, help="default: 2; on a GPU all, or as many as its memory takes")
    parser.add_argument("--threads", type=int, help="default: as many as torch takes")
    parser.add_argument("--repetitions", type=int, default=10, help="rounds that are counted")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args(arguments)
    if options.device is not None:
        try:
            content = gpu.measure(options.model, options.frames or 81, options.layers, options.seconds, options)
        except ValueError as error:
            parser.error(str(error))
        gpu.show(content)
        if options.json:
            write_json(options.json, content)
        return
    if options.model not in ON_CPUS or options.frames is not None:
        parser.error(f"on the CPU: one of {', '.join(ON_CPUS)}, with --tokens; for the rest give --device cuda")
    options.layers = 2 if options.layers is None else options.layers
    if options.repetitions < 2:
        parser.error("quartiles need at least 2 repetitions")
    if options.tokens < 1 or options.layers < 1:
        parser.error("a model has at least 1 layer and 1 token")
    with tempfile.TemporaryDirectory() as folder, torch_threads(options.threads), torch.no_grad():
        content = measure(options.model, options.layers, options.tokens, options.repetitions, Path(folder))
    show(content)
    if options.json:
        write_json(options.json, content)


def measure(model: str, layers: int, tokens: int, repetitions: int, folder: Path) -> dict[str, Any]:
    """Everything in the JSON file, with torch's threads already set."""
    folders, tensors, threads = write_folders(model, layers, folder), inputs(model, tokens), torch.get_num_threads()
    save_file(tensors, folder / "inputs.safetensors")
    memory = {n: peak_memory_mb(folders[n], folder / "inputs.safetensors", DTYPES[n], threads) for n in DTYPES}

    models = {name: load(folders[name], DTYPES[name]) for name in DTYPES}
    models[UNFUSED] = load(folders["packed"], DTYPES["packed"])
    unfuse_(models[UNFUSED])
    family = MODELS[model][0].from_scheduler({})
    steps = {name: step_of(family, transformer, tensors) for name, transformer in models.items()}
    clock = "cpu" if threads == 1 else "wall"
    timings = {name: timing(getattr(values, clock)) for name, values in time_calls(steps, repetitions).items()}
    step_ms = {name: 1e3 * t.median for name, t in timings.items()}
    return {
        "model": model,
        "tokens": tokens,
        "layers": layers,
        "threads": threads,
        "repetitions": repetitions,
        "backend": "+".join(sorted({str(layer.backend) for _, layer in packed_layers(models["packed"])})),
        "clock": clock,
        "step_ms": step_ms,
        "quartiles_ms": {name: [1e3 * t.lower_quartile, 1e3 * t.upper_quartile] for name, t in timings.items()},
        "speedup": {f"over_{name}": step_ms[name] / step_ms["packed"] for name in step_ms if name != "packed"},
        "weight_bytes": {name: memory_bytes(models[name]) for name in DTYPES},
        "block_bytes": {name: memory_bytes(_blocks(models[name])) for name in DTYPES},
        "file_bytes": {name: folder_bytes(folders[name] / "transformer") for name in DTYPES},
        "breakdown_ms": breakdown_ms(steps["packed"]),
        "peak_memory_mb": {n: {key: m[key] for key in ("imports", "loaded", "peak")} for n, m in memory.items()},
        "load_s": {name: m["load_s"] for name, m in memory.items()},
        "device": hardware(),
    }


def _blocks(transformer: Any) -> nn.Module:
    return transformer.blocks if hasattr(transformer, "blocks") else transformer.transformer_blocks


def step_of(family: Family, transformer: nn.Module, tensors: dict[str, Tensor]) -> Callable[[], Tensor]:
    dtype: Any = transformer.dtype
    latents, text = tensors["latents"].to(dtype), tensors["text"].to(dtype)
    return lambda: family.predict(transformer, latents, tensors["timestep"], text)


def show(content: dict[str, Any]) -> None:
    title = f"{content['model']}, {content['layers']} layers, {content['tokens']} tokens, threads {content['threads']}"
    rows = [
        [
            name,
            f"{ms:.1f}",
            f"{ms / content['step_ms']['packed']:.2f}",
            *[_share(content[key], name) for key in ("weight_bytes", "block_bytes", "file_bytes")],
            *_memory(content, name),
        ]
        for name, ms in content["step_ms"].items()
    ]
    header = ["", f"step, ms {content['clock']}", "over packed", "model, MB", "blocks, MB", "files, MB"]
    print_table(title, [*header, "loading, + MB", "with a step, + MB", "load, s"], rows)
    whole = sum(content["breakdown_ms"].values())
    parts = [[name, f"{ms:.2f}", f"{ms / whole:.1%}"] for name, ms in content["breakdown_ms"].items()]
    print_table("packed step, profiled", ["", "ms", "share"], parts)
    print(f"{describe(content['device'])}; kernels {content['backend']}")


def _share(sizes: dict[str, int], name: str) -> str:
    return f"{sizes[name] / 1e6:.1f} ({sizes[name] / sizes['bf16']:.1%})" if name in sizes else "–"


def _memory(content: dict[str, Any], name: str) -> list[str]:
    if name not in content["load_s"]:
        return ["–"] * 3
    memory = content["peak_memory_mb"][name]
    above = [memory[key] - memory["imports"] for key in ("loaded", "peak")]
    return [*[f"{mb:.0f}" for mb in above], f"{content['load_s'][name]:.2f}"]


if __name__ == "__main__":
    main()
