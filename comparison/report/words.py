"""Words of the comparison report: a line about each method; the name of each measure, and how its numbers are written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from comparison.report.statistics import Summary

ABSENT = "–"
Kind = Literal["no training", "training", "not quantized"]


@dataclass(frozen=True)
class MethodNote:
    kind: Kind
    text: str


_WITHOUT_TRAINING = {
    "rtn": "Round to nearest: the grid spans the whole range of the numbers. The simplest there is.",
    "mse": "The grid is shrunk to where the rounding error is smallest; rare large numbers are clipped.",
    "svdquant": "Moves outliers from activations to weights and keeps a thin unquantized side branch.",
    "viditq": "Balances and rotates channels, so that no single one stretches the grid.",
}
_TRAINED = {
    "lsq": "Learned step size: weights and grids are trained on the original task, without a teacher.",
    "qdm": "Q-DM: evens out activations per timestep and imitates the teacher's output.",
    "efficientdm": "EfficientDM: trains low-rank changes of the weights and merges them into the weights.",
    "finetune": "The full-precision model trained for as many steps, then quantized like mse: is it just more training?",
    "kd": "Knowledge distillation: imitates the teacher with learned grids. QVGen without Φ, so the control for it.",
    "qvgen": "QVGen: like kd, helped by Φ, which decays to nothing before the end.",
    "dsa": "DSAQuant: teacher and original task together, weighted by timestep; no guidance in the last steps.",
    "qvgen+": "This project's own: the combination of the parts above that measured best.",
}
_NOT_QUANTIZED = {
    "full_precision": "The original model in 32-bit numbers: the teacher, and what all others are compared with.",
}
# In the order of legends: from the simplest to the most elaborate.
METHOD_NOTES: dict[str, MethodNote] = {
    **{name: MethodNote("no training", text) for name, text in _WITHOUT_TRAINING.items()},
    **{name: MethodNote("training", text) for name, text in _TRAINED.items()},
    **{name: MethodNote("not quantized", text) for name, text in _NOT_QUANTIZED.items()},
}


@dataclass(frozen=True)
class Measure:
    """`digits` after the point; `better`: which way is better, "" where neither is; shown as value * `scale`. Without
    `spread` it is the same for every seed, and no deviation is shown."""

    key: str
    name: str
    digits: int
    better: Literal["lower", "higher", ""] = ""
    scale: float = 1.0
    unit: str = ""
    spread: bool = True

    @property
    def heading(self) -> str:
        arrow = {"lower": " ↓", "higher": " ↑", "": ""}[self.better]
        return f"{self.name}{f', {self.unit}' if self.unit else ''}{arrow}"

    def text(self, value: float | None) -> str:
        if value is None:
            return ABSENT
        if not math.isfinite(value):
            return "diverged"
        return f"{value * self.scale:,.{self.digits}f}".replace("-", "−")

    def signed(self, value: float | None) -> str:
        """With its sign, for differences."""
        if value is None or not math.isfinite(value):
            return self.text(value)
        text = f"{value * self.scale:+,.{self.digits}f}"
        return text.replace("-", "−") if float(text.replace(",", "")) else self.text(0.0)

    def summary(self, summary: Summary | None) -> str:
        """Mean ± standard deviation; the value alone for one seed, whose spread is not known."""
        if summary is None:
            return ABSENT
        if summary.sd is None or not self.spread or not math.isfinite(summary.mean):
            return self.text(summary.mean)
        return f"{self.text(summary.mean)} ± {self.text(summary.sd)}"


MEASURES: dict[str, Measure] = {
    measure.key: measure
    for measure in (
        Measure("velocity_mse", "velocity error", 5, "lower"),
        Measure("tuning_velocity_mse", "velocity error", 5, "lower"),
        Measure("tuning_psnr_db", "PSNR", 2, "higher", unit="dB"),
        Measure("latent_mse", "latent error", 4, "lower"),
        Measure("psnr_db", "PSNR", 2, "higher", unit="dB"),
        Measure("ssim", "SSIM", 4, "higher"),
        Measure("colour", "colour", 1, "higher", 100, "%"),
        Measure("direction", "direction", 1, "higher", 100, "%"),
        Measure("digit", "digit", 1, "higher", 100, "%"),
        Measure("motion", "motion", 4),
        Measure("flicker", "flicker", 4),
        Measure("calibration_seconds", "calibration", 0, "lower", unit="s"),
        Measure("train_seconds", "training", 0, "lower", unit="s"),
        Measure("peak_rss_mb", "peak memory", 0, "lower", unit="MB"),
        Measure("bytes", "size", 2, "lower", 1e-6, "MB", spread=False),
        Measure("step_ms", "step", 2, "lower", unit="ms"),
        Measure("speedup", "step, times as fast as fp32", 2, "higher"),
        Measure("final_loss", "final loss", 5, "lower"),
        Measure("mean_gradient_norm", "mean gradient norm", 4, "lower"),
    )
}
QUALITY = ("velocity_mse", "latent_mse", "psnr_db", "ssim", "colour", "direction", "digit", "motion", "flicker")


def method_order(method: str) -> tuple[int, str]:
    """Sort key: known methods in the order of METHOD_NOTES, then others by name."""
    known = list(METHOD_NOTES)
    return (known.index(method) if method in known else len(known), method)


def count(number: int, noun: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
