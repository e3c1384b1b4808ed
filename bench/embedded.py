"""`python -m bench.embedded`: a denoising step of the embedded model, packed against full precision and bfloat16.

128 channels and few tokens: what an operation costs before it computes anything is most of a step. The model of
assets/tiny-wan is packed by plain rounding with the scheme of params.yaml, which takes as long to run as any other.

    fp32, bf16         diffusers, as `dvc repro benchmark` loads them
    packed             float32 around the packed layers, likewise
    ..., guided        both evaluations of a guided step, each a call, as diffusers' pipeline makes them
    ..., one batch     the same calls as qvgen/sampling/one_batch.py answers them

fp32 stands over packed, and fp32 guided over packed guided. Steps are taken in turn. The fastest call of each counts, because
on a busy machine the others were disturbed: in CPU time with one thread and in wall time with several, as in bench/linear.py.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.report import print_table, write_json
from qvgen.checkpoint.packed import export_pipeline
from qvgen.checkpoint.pipeline import load_transformer
from qvgen.evaluation.cost.hardware import describe, hardware
from qvgen.evaluation.cost.size import write_variant
from qvgen.evaluation.cost.speed import time_calls, torch_threads
from qvgen.models.wan import WanFamily
from qvgen.nn.packed_linear import packed_layers
from qvgen.nn.swap import convert_, prepare_
from qvgen.params import load_params
from qvgen.sampling.one_batch import both_at_once

MODEL = Path("assets/tiny-wan")
LATENTS = (8, 3, 8, 8)  # channels, frames, height, width of a clip of 9 frames of 32 x 32 pixels
TEXT = (12, 64)  # tokens, features


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.embedded", description="a step of the embedded model")
    parser.add_argument("--threads", type=int, help="default: as many as torch takes")
    parser.add_argument("--repetitions", type=int, default=200, help="rounds that are counted")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args(arguments)
    if options.repetitions < 1:
        parser.error("at least 1 repetition")
    with tempfile.TemporaryDirectory() as folder, torch_threads(options.threads), torch.no_grad():
        content = measure(Path(folder), options.repetitions)
    show(content)
    if options.json:
        write_json(options.json, content)


def models(folder: Path) -> dict[str, Any]:
    """Transformers {"fp32", "bf16", "packed"}, whose files are written to `folder`."""
    scheme = load_params().scheme
    write_variant(MODEL, folder / "bf16", "bfloat16")
    rounded = load_transformer(MODEL)
    prepare_(rounded, scheme, default_targets=WanFamily.default_targets)
    convert_(rounded)
    export_pipeline(MODEL, rounded, scheme, folder / "packed", torch.float32)
    return {
        "fp32": load_transformer(MODEL),
        "bf16": load_transformer(folder / "bf16", torch.bfloat16),
        "packed": load_transformer(folder / "packed"),
    }


def measure(folder: Path, repetitions: int) -> dict[str, Any]:
    transformers = models(folder)
    actions: dict[str, Callable[[], object]] = {}
    for name, transformer in transformers.items():
        actions[name] = step(transformer)
        actions[f"{name}, guided"] = guided_step(transformer, one_batch=False)
        actions[f"{name}, guided, one batch"] = guided_step(transformer, one_batch=True)
    samples = time_calls(actions, repetitions, warm_up=20)
    clock = "cpu" if torch.get_num_threads() == 1 else "wall"
    step_ms = {name: 1e3 * min(getattr(values, clock)) for name, values in samples.items()}
    return {
        "threads": torch.get_num_threads(),
        "repetitions": repetitions,
        "clock": clock,
        "step_ms": step_ms,
        "speedup": {name: step_ms["fp32" + name.removeprefix(name.split(",")[0])] / ms for name, ms in step_ms.items()},
        "backend": "+".join(sorted({str(layer.backend) for _, layer in packed_layers(transformers["packed"])})),
        "device": hardware(),
    }


def step(transformer: Any) -> Callable[[], Tensor]:
    latents, (text, _) = inputs(transformer)
    timestep, family = torch.full((1,), 500.0), WanFamily()
    return lambda: family.predict(transformer, latents, timestep, text)


def guided_step(transformer: Any, one_batch: bool) -> Callable[[], object]:
    """Both calls that a pipeline makes, as qvgen/sampling/ passes them on or as they are."""
    latents, texts = inputs(transformer)
    timestep, family = torch.full((1,), 500.0), WanFamily()
    pipeline = _Pipeline(transformer)
    called = both_at_once(pipeline, *texts) if one_batch else pipeline
    return lambda: [family.predict(called.transformer, latents, timestep, text) for text in texts]


@dataclass
class _Pipeline:
    transformer: Any
    do_classifier_free_guidance: bool = True


def inputs(transformer: Any) -> tuple[Tensor, list[Tensor]]:
    generator, dtype = torch.Generator().manual_seed(0), transformer.dtype
    latents = torch.randn(1, *LATENTS, generator=generator).to(dtype)
    return latents, [torch.randn(1, *TEXT, generator=generator).to(dtype) for _ in range(2)]


def show(content: dict[str, Any]) -> None:
    rows = [[name, f"{ms:.2f}", f"{content['speedup'][name]:.2f}"] for name, ms in content["step_ms"].items()]
    print_table(f"embedded model, threads {content['threads']}", ["", f"step, ms {content['clock']}", "fp32 over it"], rows)
    print(f"{describe(content['device'])}; kernels {content['backend']}")


if __name__ == "__main__":
    main()
