"""`python -m bench.gpu.qat_step`: a step of quantization-aware training against one of plain fine-tuning on a GPU.

One sample of 480 x 832 pixels, activation checkpointing, bfloat16 autocast over float32 weights, AdamW; the teacher's forward
is not counted (a target is given), nor is Φ. Where the memory does not take all layers there are fewer. Both kinds run one
after the other, because both at once would need the optimizer's memory twice.
"""

from __future__ import annotations

import argparse
import gc
import sys
from typing import Any

import torch
from torch import nn

from bench.dit_step.models import MODELS, family_inputs
from bench.gpu.timing import device_of, rounds_within, time_on
from bench.report import print_table, write_json
from bench.roofline import tokens
from qvgen.evaluation.cost.speed import timing
from qvgen.nn.swap import prepare_
from qvgen.quant.scheme import QuantScheme

_BYTES = 16  # of a parameter: itself, its gradient, AdamW's two, all in float32
_FAKE_QUANTIZED = 8  # bytes more of a parameter while its layer runs
_USABLE = 0.85


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.qat_step", description="a QAT step against fine-tuning")
    parser.add_argument("--device", type=device_of, default="cuda")
    parser.add_argument("--model", choices=list(MODELS), default="wan2.1-1.3b")
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--layers", type=int, help="default: all, or as many as the memory takes")
    parser.add_argument("--seconds", type=float, default=60, help="about how long to measure")
    parser.add_argument("--json")
    options = parser.parse_args(arguments)
    if options.frames < 1 or (options.frames - 1) % 4:
        parser.error(f"frames must be 4 n + 1, not {options.frames}")
    whole = MODELS[options.model][1]["num_layers"]
    layers = options.layers or min(whole, layers_that_fit(options.model, options.frames, options.device))
    if not 1 <= layers <= whole:
        parser.error(f"not one layer of {options.model} fits the memory at {options.frames} frames" if layers < 1 else
                     f"{options.model} has 1 to {whole} layers, not {layers}")  # fmt: skip
    ms = {}
    for kind in ("fine_tuning", "qat"):
        ms[kind] = step_ms(options.model, options.frames, layers, options.device, kind == "qat", options.seconds / 2)
        gc.collect()  # modules and their optimizer hold each other
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    content = {
        "model": options.model, "frames": options.frames, "tokens": tokens(options.frames), "layers": layers,
        "of_layers": whole, "step_ms": ms, "qat_over_fine_tuning": ms["qat"] / ms["fine_tuning"],
    }  # fmt: skip
    title = f"{options.model}, {layers} of {whole} layers, {options.frames} frames: a training step"
    print_table(title, ["", "ms"], [[name, f"{value:.1f}"] for name, value in ms.items()])
    print(f"QAT takes {content['qat_over_fine_tuning']:.2f} times as long")
    if options.json:
        write_json(options.json, content)


def step_ms(model: str, frames: int, layers: int, device: torch.device, quantized: bool, seconds: float) -> float:
    family, config = MODELS[model]
    torch.manual_seed(0)
    with torch.device(device):
        transformer: Any = family.transformer(config | {"num_layers": layers})
    if quantized:
        prepare_(transformer, QuantScheme(), default_targets=family.default_targets)
    transformer.train().enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-6, fused=device.type == "cuda")
    tensors, predictor = family_inputs(model, frames, device), family.from_scheduler({})
    latents, text = tensors["latents"].float(), tensors["text"].float()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            predicted = predictor.predict(transformer, latents, tensors["timestep"], text).float()
        nn.functional.mse_loss(predicted, latents).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    once = time_on(device, {"": step}, 2)[""]
    rounds = rounds_within(seconds, min(once.wall))
    return 1e3 * timing(time_on(device, {"": step}, rounds)[""].wall).median


def layers_that_fit(model: str, frames: int, device: torch.device) -> int:
    family, config = MODELS[model]
    if device.type == "cpu":
        return config["num_layers"]
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in family.transformer(config | {"num_layers": n}).parameters()) for n in (1, 2)]
    block, width = sizes[1] - sizes[0], config["num_attention_heads"] * config["attention_head_dim"]
    # What a layer keeps for its backward pass while it runs again, in float32 where it is quantized; one x for every layer.
    kept = tokens(frames) * (40 * width + 16 * config.get("ffn_dim", 4 * width))
    free = _USABLE * torch.cuda.mem_get_info(device)[0] - kept - _BYTES * (2 * sizes[0] - sizes[1]) - _FAKE_QUANTIZED * block
    return int(free / (_BYTES * block + 4 * tokens(frames) * width))


if __name__ == "__main__":
    sys.exit(main())
