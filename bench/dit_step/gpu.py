"""A denoising step on a GPU, packed against bfloat16: `python -m bench.dit_step --device cuda --model ... --frames 81`.

    bf16                       diffusers, as it is
    bf16_compiled              its blocks compiled (compile_repeated_blocks; a model without a list of these whole)
    packed                     W4A4, in fused blocks where the family has them
    packed_compiled            the same, compiled likewise
    packed_int8_attention      packed, with QVGEN_ATTENTION=int8
    packed_linears_compiled    packed layers in diffusers' own blocks, compiled: what the linear layers alone bring

All share one set of bfloat16 weights, of random numbers, and but for packed_int8_attention the attention of PyTorch that is
fastest at this length here; `attention_ms` has a call of each, self-attention of normal values. One sample of 480 x 832
pixels. Where the memory does not take all layers there are fewer, and the result says how many: a ratio of fewer layers is
below that of all, because embedders are not packed.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench.dit_step.models import MODELS, family_inputs, memory_bytes
from bench.gpu.timing import CLOCK, rounds_within, time_on
from bench.report import print_table
from bench.roofline import tokens
from qvgen.evaluation.cost.speed import timing
from qvgen.integrations.fused import fuse_, unfuse_
from qvgen.integrations.fused.attention import ENVIRONMENT
from qvgen.kernels.block_ops import attention_int8
from qvgen.kernels.expressions import attention
from qvgen.nn.packed_linear import packed_layers
from qvgen.nn.swap import convert_, prepare_
from qvgen.quant.scheme import QuantScheme

BASELINE, BASELINE_COMPILED = "bf16", "bf16_compiled"
OURS, OURS_COMPILED, LINEARS = "packed", "packed_compiled", "packed_linears_compiled"
OURS_INT8, INT8 = "packed_int8_attention", "int8"
_PACKED = 0.3  # of bfloat16, layouts and scales included
_USABLE = 0.85  # of the free memory


def measure(model: str, frames: int, layers: int | None, seconds: float, options: Any) -> dict[str, Any]:
    """The JSON file's content. Raises ValueError for sizes that cannot be."""
    device: torch.device = options.device
    if model not in MODELS or frames < 1 or (frames - 1) % 4:
        raise ValueError(f"{model}, {frames} frames: frames must be 4 n + 1, the model one of {', '.join(MODELS)}")
    family, config = MODELS[model]
    whole = config["num_layers"]
    most = layers_that_fit(model, frames, device)
    count = min(whole, most) if layers is None else layers
    if count < 1 and most < 1:
        free = f"{_free(device) / 2**30:.1f} GiB of free memory"
        raise ValueError(f"not one layer of {model} with its activations fits {free}: give fewer --frames")
    if not 1 <= count <= whole:
        raise ValueError(f"{model} has 1 to {whole} layers, not {count}")
    with torch.no_grad():
        found = attention_ms(config, frames, device)
        best, context = best_attention(found)
        with context:
            models = variants(model, count, device, compiled=not options.eager)
            content = _time(models, family_inputs(model, frames, device), family.from_scheduler({}), seconds, device)
    return {
        "model": model, "frames": frames, "tokens": tokens(frames), "layers": count, "of_layers": whole,
        "attention": best, "attention_ms": found, "clock": CLOCK if device.type != "cpu" else "wall",
        "backend": "+".join(sorted({str(layer.backend) for _, layer in packed_layers(models[OURS])})),
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else None, "torch": torch.__version__,
        "bytes": {name: memory_bytes(models[name]) for name in (BASELINE, OURS)},
        "bytes_of_all_layers": {name: _whole_bytes(models[name], count, whole) for name in (BASELINE, OURS)},
    } | content  # fmt: skip


def variants(model: str, layers: int, device: torch.device, compiled: bool) -> dict[str, nn.Module]:
    family, config = MODELS[model]
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # at once: in float32 first, 14B would need twice its memory
    try:
        with torch.device(device):
            baseline = family.transformer(config | {"num_layers": layers}).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(dtype)
    scheme = QuantScheme()
    packed = _sharing(baseline)
    prepare_(packed, scheme, default_targets=family.default_targets)
    convert_(packed)
    for _, layer in packed_layers(packed):
        layer.prepare_backend()
    fuse_(packed)
    models = {BASELINE: baseline, OURS: packed, OURS_INT8: packed}
    if compiled:
        linears = _sharing(packed)
        unfuse_(linears)
        compilable = {BASELINE_COMPILED: _sharing(baseline), OURS_COMPILED: _sharing(packed), LINEARS: linears}
        models |= {name: _compiled(module) for name, module in compilable.items()}
    return models


def attention_ms(config: dict[str, Any], frames: int, device: torch.device) -> dict[str, float]:
    """Of one call, by each of PyTorch's kernels that this card has (SDPBackend's names) and by ours, "int8"."""
    if device.type != "cuda":
        return {}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = 1, tokens(frames), config["num_attention_heads"], config["attention_head_dim"]
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    found: dict[str, float] = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        with suppress(RuntimeError), sdpa_kernel(backend):  # it may not exist here
            found[backend.name] = _median_ms(device, lambda: attention(q, k, v))
    with suppress(Exception):  # the step with it says what is wrong
        found[INT8] = _median_ms(device, lambda: attention_int8(q, k, v))
    return found


def _median_ms(device: torch.device, action: Callable[[], object]) -> float:
    return 1e3 * timing(time_on(device, {"": action}, 3)[""].wall).median


def best_attention(found: dict[str, float]) -> tuple[str, AbstractContextManager[Any]]:
    """The fastest of PyTorch's kernels, and a context in which it runs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    ordered = sorted(found.keys() - {INT8}, key=found.__getitem__)
    if not ordered:
        return "PyTorch's choice", nullcontext()
    # The rest of the model may have shapes that the fastest does not take: it goes first, the others stay.
    backends = [getattr(SDPBackend, name) for name in (*ordered, "MATH")]
    return ordered[0].lower(), sdpa_kernel(backends, set_priority=True)


def layers_that_fit(model: str, frames: int, device: torch.device) -> int:
    """How many of a model's layers fit, in bfloat16 and packed at once, beside the activations of one."""
    family, config = MODELS[model]
    if device.type == "cpu":
        return config["num_layers"]
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in family.transformer(config | {"num_layers": n}).parameters()) for n in (1, 2)]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    activations = 2 * tokens(frames) * (16 * width + 3 * config.get("ffn_dim", 4 * width))
    block, rest = (1 + _PACKED) * 2 * (sizes[1] - sizes[0]), 2 * (2 * sizes[0] - sizes[1])
    return int((_USABLE * _free(device) - activations - rest) / block)


def _whole_bytes(model: Any, layers: int, whole: int) -> int:
    """Of the weights with all layers, whose sizes are all the same."""
    blocks = model.blocks if hasattr(model, "blocks") else model.transformer_blocks
    return memory_bytes(model) + memory_bytes(blocks) * (whole - layers) // layers


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


def _sharing(model: nn.Module) -> nn.Module:
    """A copy with the same memory: the same parameters and buffers, and the very packed layers."""
    shared = [*model.parameters(), *model.buffers(), *[layer for _, layer in packed_layers(model)]]
    copied = copy.deepcopy(model, {id(one): one for one in shared})
    for module in copied.modules():  # a fused forward is bound to the block that it was made for
        vars(module).pop("forward", None)
    fuse_(copied)
    return copied


def _compiled(model: Any) -> nn.Module:
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(fullgraph=True)
    else:
        model.compile()
    return model


def _time(
    models: dict[str, nn.Module], tensors: dict[str, Tensor], family: Any, seconds: float, device: torch.device
) -> dict[str, Any]:
    steps: dict[str, Callable[[], object]] = {}
    failed = {}
    for name, model in models.items():
        asked_for = patch.dict(os.environ, {ENVIRONMENT: INT8}) if name == OURS_INT8 else nullcontext()

        def step(model: nn.Module = model, asked_for: AbstractContextManager[Any] = asked_for) -> Tensor:
            with asked_for:
                return family.predict(model, tensors["latents"], tensors["timestep"], tensors["text"])

        try:
            step()  # compiles
        except torch.OutOfMemoryError as error:
            failed[name] = f"out of memory: {str(error).splitlines()[0]}; give fewer --layers or --frames"
        except Exception as error:  # the others are measured all the same
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            steps[name] = step
    once = time_on(device, steps, 2)
    rounds = rounds_within(seconds, sum(min(s.wall) for s in once.values()))
    timings = {name: timing(values.wall) for name, values in time_on(device, steps, rounds).items()}
    step_ms = {name: 1e3 * t.median for name, t in timings.items()}
    base = step_ms.get(BASELINE_COMPILED)
    return {
        "step_ms": step_ms,
        "quartiles_ms": {name: [1e3 * t.lower_quartile, 1e3 * t.upper_quartile] for name, t in timings.items()},
        "speedup_over_bf16_compiled": {name: base / ms for name, ms in step_ms.items()} if base else {},
        "repetitions": rounds,
        "failed": failed,
    }


def show(content: dict[str, Any]) -> None:
    speedups = content["speedup_over_bf16_compiled"]
    cells = [
        [name, f"{ms:.2f}", f"{speedups[name]:.2f}" if name in speedups else "–"] for name, ms in content["step_ms"].items()
    ]
    title = (
        f"{content['model']}, {content['layers']} of {content['of_layers']} layers, {content['frames']} frames "
        f"({content['tokens']} tokens), attention {content['attention']}"
    )
    print_table(title, ["", "step, ms", "over bf16_compiled"], cells)
    if content["attention_ms"]:
        print("a self-attention, ms: " + ", ".join(f"{name} {ms:.2f}" for name, ms in content["attention_ms"].items()))
    for name, reason in content["failed"].items():
        print(f"no {name}: {reason}")
    share = content["bytes"][OURS] / content["bytes"][BASELINE]
    print(f"{content['card'] or 'CPU'}; kernels {content['backend']}; weights {share:.1%} of bf16")
