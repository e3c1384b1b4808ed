"""Where the time of a packed step goes, by PyTorch's profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

# Operator -> part. Time below one of these counts for it, but for the norms and sums inside of fused ops, which are written
# down by themselves where they run by themselves (qvgen/kernels/fused_ops.py); what is in none of them is the rest.
_PARTS = {
    "qvgen::quantized_feed_forward": "feed_forward",
    "qvgen::layer_norm_feed_forward": "feed_forward",
    "qvgen::attention": "attention",
    "qvgen::attention_int8": "attention",
    "aten::scaled_dot_product_attention": "attention",
    "qvgen::quantized_linears": "qkv",
    "qvgen::layer_norm_linears": "qkv",
    "qvgen::quantized_linear": "other_packed_linears",
    "qvgen::linear_add_gated": "other_packed_linears",
    "aten::linear": "embedders",
    "aten::conv3d": "embedders",
    "qvgen::layer_norm_modulate": "norms_and_modulation",
    "qvgen::rms_norm_rotary": "norms_and_modulation",
    "qvgen::add_gated": "norms_and_modulation",
}
_INSIDE = ("qvgen::layer_norm_modulate", "qvgen::add_gated")
PARTS = tuple(dict.fromkeys(_PARTS.values()))
_STEP = "bench.step"


def breakdown_ms(step: Callable[[], object], steps: int = 3) -> dict[str, float]:
    """Milliseconds of each of PARTS and of "rest" (other operators, and Python between operators) in one call of `step`,
    the mean of `steps` calls. The parts add up to the step, which the profiler makes a little longer."""
    step()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(steps):
            with record_function(_STEP):
                step()
    roots = [event for event in profiler.events() or () if event.name == _STEP]
    microseconds: dict[str, float] = defaultdict(float)
    for root in roots:
        _add(root, microseconds)
    whole = sum(root.time_range.elapsed_us() for root in roots)
    times = {name: microseconds[name] for name in PARTS} | {"rest": whole - sum(microseconds.values())}
    return {name: 1e-3 * value / steps for name, value in times.items()}


def _add(event: FunctionEvent, microseconds: dict[str, float]) -> None:
    part = _PARTS.get(event.name)
    inside = event.cpu_children if part is None else [child for child in event.cpu_children if child.name in _INSIDE]
    if part is not None:
        microseconds[part] += event.time_range.elapsed_us() - sum(child.time_range.elapsed_us() for child in inside)
    for child in inside:
        _add(child, microseconds)
