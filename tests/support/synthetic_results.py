"""Result files as the comparison leaves them, with invented numbers: what the report is tested on."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random
from typing import Any

import torch

from comparison.store import result_text, save_clips, thinned
from qvgen.data.digits import ALL_ATTRIBUTES, sample_clips

# Velocity error at W4A4 that the fakes scatter around.
METHODS = {
    "rtn": 0.041,
    "mse": 0.037,
    "svdquant": 0.031,
    "viditq": 0.034,
    "lsq": 0.026,
    "qdm": 0.0232,
    "efficientdm": 0.0285,
    "finetune": 0.0362,
    "kd": 0.0211,
    "qvgen": 0.0209,
    "dsa": 0.0214,
    "qvgen+": 0.0192,
    "other<b>": 0.05,  # unknown to the report, and not to be taken for HTML
}
UNTRAINED = ("rtn", "mse", "svdquant", "viditq")
COSTLY = ("svdquant",)
WITH_PHI = ("qvgen", "qvgen+")
FACTOR = {"W4A4": 1.0, "W3A3": 3.1, "W2A4": 1.6, "W2A2": 13.0}  # error over that at W4A4
SIZE = {"W4A4": 1_130_000, "W3A3": 920_000, "W2A4": 710_000, "W2A2": 705_000}
SEEDS = (0, 1, 2)
STEPS = 300
LAYERS = [
    f"blocks.{block}.{layer}"
    for block in range(4)
    for layer in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2")
]


def write_results(folder: Path, *, prompts: int = 2, seeds: tuple[int, ...] = SEEDS) -> None:
    """All methods at W4A4 and W3A3, some at fewer bits, an ablation, tuning and full precision."""
    real = sample_clips(ALL_ATTRIBUTES[7 : 7 + 40 * prompts : 40], torch.Generator().manual_seed(0))
    words = [attributes.caption for attributes in ALL_ATTRIBUTES[7 : 7 + 40 * prompts : 40]]
    for method in METHODS:
        for bits in FACTOR if method in ("rtn", "kd", "qvgen") else ("W4A4", "W3A3"):
            for seed in seeds:
                group = "main" if bits in ("W4A4", "W3A3") else "low"
                case = write_run(folder, method, bits, seed, group=group)
                if seed == 0:
                    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(seed)) * _error(method, bits) * 4
                    write_clips(case, real + noise, words)
    for variant, factor in (("ratio-1by4", 1.004), ("rank-8", 1.03), ("no-new-svd", 1.012)):
        for seed in seeds[:2]:
            write_run(folder, "qvgen", "W4A4", seed, group="ablation", variant=variant, factor=factor)
    for rate in (0.5, 1.0, 2.0):
        for method in ("kd", "qvgen"):
            error = 0.07 * (1 + 0.1 * abs(math.log2(rate)))
            write_run(folder, method, "W3A3", 100, group="tuning", rate=rate, velocity_mse=None, tuning_velocity_mse=error)
    own = {"colour": 1.0, "direction": 0.98, "digit": 0.91, "motion": 0.0312, "flicker": 0.041, "bytes": 5_939_662}
    named = {"case": "full_precision", "group": "reference", "method": "full precision", "bits": "W32A32", "seed": 0}
    path = folder / "full_precision.json"
    path.write_text(result_text({"scores": named | own}))
    write_clips(path, real, words)


def write_run(
    folder: Path,
    method: str,
    bits: str,
    seed: int,
    *,
    group: str = "main",
    variant: str = "",
    factor: float = 1.0,
    rate: float = 1.0,
    **changed: Any,
) -> Path:
    """One case with scores, and the curves that its method has. Returns its file."""
    name = f"{method.replace('<b>', '')}-{bits}-{seed}"
    name += f"-{variant}" if variant else f"-lr{rate:g}" if group == "tuning" else ""
    path, random = folder / f"{name}.json", Random(f"{method} {bits} {seed} {variant}")
    folder.mkdir(parents=True, exist_ok=True)
    error = _error(method, bits) * factor * (1 + 0.02 * random.gauss(0, 1))
    trained = method not in UNTRAINED
    step = 6.7 * (1.25 if method in COSTLY else 1) * (1 + 0.01 * random.gauss(0, 1))
    scores: dict[str, Any] = {
        "case": name,
        "group": group,
        "variant": variant,
        "method": method,
        "bits": bits,
        "seed": seed,
        "velocity_mse": error,
        "latent_mse": 2.4 * error,
        "psnr_db": 15 - 10 * math.log10(error),
        "ssim": 1 - 2.3 * error,
        "colour": 1.0,
        "direction": max(0.1, 0.99 - error),
        "digit": max(0.1, 0.93 - 2 * error),
        "motion": 0.0312 + error / 10,
        "flicker": 0.041 + error / 8,
        "calibration_seconds": random.uniform(20, 25),
        "train_seconds": random.uniform(280, 330) if trained else 0.0,
        "peak_rss_mb": 980.0 if trained else 640.0,
        "bytes": SIZE.get(bits, 5_900_000),
        "step_ms": step,
        "step_ms_fp32": 7.3 * (1 + 0.01 * random.gauss(0, 1)),
        "zero_inference_cost": method not in COSTLY,
        "velocity_mse_by_timestep": {str(50.0 + 100 * i): error * (0.4 + 2.6 * math.exp(-i / 2)) for i in range(10)},
        "layer_error": {
            layer: 1.6 * error**0.5 * (1 + 0.6 * random.random() + (i % 6 == 5)) for i, layer in enumerate(LAYERS)
        },
    }
    scores |= {"learning_rate_factor": rate, "steps": 0, "final_loss": None, "mean_gradient_norm": None}
    result: dict[str, Any] = {}
    if trained:
        scores |= {"steps": STEPS, "final_loss": error * 1.1, "mean_gradient_norm": 0.3 + error}
        result["curve"] = _curve(method, error, random)
    if method in WITH_PHI:
        result["spectrum"] = _spectrum()
    path.write_text(result_text({"scores": scores | changed, **result}))
    return path


def _error(method: str, bits: str) -> float:
    return METHODS.get(method, 0.02) * FACTOR.get(bits, 1.0)


def _curve(method: str, error: float, random: Random) -> dict[str, list[float]]:
    rows = []
    for step in range(STEPS):
        rank, u = _phi_state(step) if method in WITH_PHI else (0, 0.0)
        loss = error * (1 + (1.5 if rank else 4) * math.exp(-step / 40)) * random.uniform(0.8, 1.25)
        gradient = (0.25 + (0.3 if rank else 0.8) * math.exp(-step / 50)) * random.uniform(0.8, 1.25)
        rows.append({"step": step, "loss": loss, "gradient_norm": gradient, "rank": rank, "u": u})
    return thinned(rows)


def _phi_state(step: int) -> tuple[int, float]:
    phase, within = divmod(step - 60, 35)
    if step < 60:
        return 32, 1.0
    return (32 >> phase, 0.5 * (1 + math.cos(math.pi * within / 34))) if phase < 6 else (0, 0.0)


def _spectrum() -> dict[str, Any]:
    steps = list(range(0, 270, 15))
    ranks = [_phi_state(step)[0] for step in steps]
    values = [[math.exp(-i * (0.06 + step / 900)) for i in range(rank)] for step, rank in zip(steps, ranks, strict=True)]
    share = [sum(v < 0.3 for v in row) / max(1, len(row)) for row in values]
    return {"limit": 0.5, "step": steps, "share_small": share, "rank": ranks, "values": values}


def write_clips(result: Path, clips: torch.Tensor, prompts: list[str]) -> None:
    """All `clips` of a result file, where the report looks for them."""
    folder = result.parent.with_name("clips")
    folder.mkdir(exist_ok=True)
    save_clips(folder / f"{result.stem}.safetensors", clips, prompts, len(prompts))
