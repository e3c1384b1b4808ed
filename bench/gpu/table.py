"""Results of bench.gpu as rows, as a Markdown table, and against the targets (stated for an H100, 81 frames)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from bench.dit_step.gpu import BASELINE, LINEARS, OURS, OURS_COMPILED, OURS_INT8
from bench.gpu.parts import Result
from bench.report import geometric_mean

FOR = "H100"
WIDE = 5120  # inputs or outputs of a layer of Wan 14B
FUSED = (OURS, OURS_COMPILED, OURS_INT8)
MANY = 4096  # tokens from which a layer counts


class Target(NamedTuple):
    name: str
    limit: float
    at_most: bool  # else at least
    value: Callable[[dict[str, Any]], float | None]


def targets(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Each target with what was measured: "met", "missed", or "not measured"."""
    content = {result.part: result.content for result in results if result.content is not None}
    found = []
    for target in TARGETS:
        value = target.value(content)
        met = value is not None and (value <= target.limit if target.at_most else value >= target.limit)
        state = "not measured" if value is None else "met" if met else "missed"
        found.append({"target": target.name, "limit": target.limit, "at_most": target.at_most, "value": value, "state": state})
    return found


def rows_of(results: Iterable[Result]) -> list[dict[str, Any]]:
    """A row for each thing measured, and one for each part that has none."""
    rows: list[dict[str, Any]] = []
    for part, status, seconds, content in results:
        common = {"part": part, "status": status, "seconds": round(seconds, 1)}
        found: list[dict[str, Any]] = []
        if content is not None and "rows" in content:
            for row in content["rows"]:
                what = f"{row['m']} x {row['k']} x {row['n']}, W{row['weight_bits']}A{row['activation_bits']}"
                found += [
                    {"what": what, "variant": name, "ms": ms, "over_it": row["speedup"].get(name)}
                    for name, ms in row["ms"].items()
                ]
        elif content is not None and "step_ms" in content:
            what = (
                f"{content['layers']} of {content['of_layers']} layers, {content['frames']} frames, {content['tokens']} tokens"
            )
            speedups = content.get("speedup_over_bf16_compiled", {})
            found += [
                {"what": what, "variant": name, "ms": ms, "over_bf16_compiled": speedups.get(name)}
                for name, ms in content["step_ms"].items()
            ]
            found += [{"what": what, "variant": name, "failed": why} for name, why in content.get("failed", {}).items()]
            found += [
                {"what": what, "variant": f"self-attention, {name}", "ms": ms}
                for name, ms in content.get("attention_ms", {}).items()
            ]
        elif content is not None:
            found.append({"what": content.get("summary", ""), **{k: v for k, v in content.items() if k != "summary"}})
        rows += [common | row for row in found or [{}]]
    return rows


def markdown(content: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items() if version)
    lines = [f"# {content['card']}, {content['date']}", "", f"`python -m bench.gpu`, {versions}.", ""]
    lines += [f"Targets are stated for an {FOR}.", "", "| target | limit | measured | |", "|---|---|---|---|"]
    for target in content["targets"]:
        value = "–" if target["value"] is None else f"{target['value']:.3g}"
        limit = f"{'<=' if target['at_most'] else '>='} {target['limit']:g}"
        lines.append(f"| {target['target']} | {limit} | {value} | {target['state']} |")
    lines += ["", "| part | what | variant | ms | packed over it | over compiled bf16 |", "|---|---|---|---|---|---|"]
    for row in content["rows"]:
        numbers = [f"{row[key]:.3f}" if row.get(key) is not None else "–" for key in ("ms", "over_it", "over_bf16_compiled")]
        what = row.get("what") or row["status"]
        if row["status"] != "ok" and what != row["status"]:
            what += f" ({row['status']})"
        cells = [row["part"], what, row.get("variant", "–"), *numbers]
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _speedup(model: str, *names: str) -> Callable[[dict[str, Any]], float | None]:
    def value(content: dict[str, Any]) -> float | None:
        speedups = content.get(f"step-{model}-81", {}).get("speedup_over_bf16_compiled", {})
        return max((speedups[name] for name in names if name in speedups), default=None)

    return value


def _memory(model: str) -> Callable[[dict[str, Any]], float | None]:
    def value(content: dict[str, Any]) -> float | None:
        step = content.get(f"step-{model}-81")
        return None if step is None else step["bytes_of_all_layers"][OURS] / step["bytes_of_all_layers"][BASELINE]

    return value


def _layers(content: dict[str, Any]) -> float | None:
    rows = content.get("linear", {}).get("rows", [])
    ratios = [r["speedup"].get("torch_bf16") for r in rows if r["m"] >= MANY and WIDE in (r["k"], r["n"])]
    return geometric_mean(r for r in ratios if r) if any(ratios) else None


def _qat(content: dict[str, Any]) -> float | None:
    step = content.get("qat-step", {})
    return step["qat_over_fine_tuning"] if (step.get("model"), step.get("frames")) == ("wan2.1-1.3b", 49) else None


TARGETS = (
    Target("packed linears alone, Wan 1.3B step", 1.07, False, _speedup("wan2.1-1.3b", LINEARS)),
    Target("packed linears alone, Wan 14B step", 1.15, False, _speedup("wan2.1-14b", LINEARS)),
    Target("fused, Wan 1.3B step, best of both attentions", 1.6, False, _speedup("wan2.1-1.3b", *FUSED)),
    Target("fused, Wan 14B step, best of both attentions", 1.6, False, _speedup("wan2.1-14b", *FUSED)),
    Target("linear layers of Wan 14B over cuBLAS bf16, geometric mean", 1.6, False, _layers),
    Target("weights in GPU memory, Wan 14B, of bf16", 0.27, True, _memory("wan2.1-14b")),
    Target("QAT step over fine-tuning, Wan 1.3B, 49 frames", 1.1, True, _qat),
)  # fmt: skip
