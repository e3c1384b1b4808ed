"""The gate of section `gate` in params.yaml: may this model become champion? Numbers only; nothing is read or written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qvgen.params import Gate

ACCURACIES = ("colour", "direction", "digit")


@dataclass(frozen=True)
class Rule:
    """One limit and the value held against it; `value` is NaN if it was not measured."""

    name: str
    value: float
    sign: str  # "<=" or ">="
    limit: float
    words: str

    @property
    def ok(self) -> bool:
        """A value that is NaN passes nothing."""
        return self.value <= self.limit if self.sign == "<=" else self.value >= self.limit

    @property
    def known(self) -> float | None:
        """`value`, or None if it was not measured: JSON has no NaN."""
        return None if math.isnan(self.value) else self.value

    @property
    def limit_text(self) -> str:
        return f"{self.sign} {self.limit:.5g}"

    def __str__(self) -> str:
        value = "not measured" if math.isnan(self.value) else f"{self.value:.5g}"
        verdict = "PASS" if self.ok else "FAIL"
        return f"{verdict}  {self.name:<28}{value:>13} {self.limit_text:<12} {self.words}"


def evaluate_gate(
    gate: Gate, challenger: Mapping[str, float], champion: Mapping[str, float] | None, *, same_machine: bool = True
) -> list[Rule]:
    """Every rule that applies. `challenger` and `champion` are metrics as stage register records them, by dotted name.

    Without a champion its rules are left out; so is the comparison of speeds unless both were measured on the same machine,
    and what the champion has no number for.
    """
    value = _Metrics(challenger)
    rules = [
        Rule(
            f"{name} drop",
            value[f"full_precision.{name}"] - value[f"packed.{name}"],
            "<=",
            gate.max_accuracy_drop,
            f"share of prompts whose {name} is right, below full precision",
        )
        for name in ACCURACIES
    ]
    rules += [
        Rule("psnr_db", value["packed.psnr_db"], ">=", gate.min_psnr_db, "dB, videos against full precision"),
        Rule("velocity_mse", value["packed.velocity_mse"], "<=", gate.max_velocity_mse, "error of a denoising step's output"),
        Rule(
            "bytes over bf16",
            value["bytes.packed"] / value["bytes.bf16"] if value["bytes.bf16"] else math.nan,
            "<=",
            gate.max_bytes_over_bf16,
            "size of the packed transformer over bf16",
        ),
        Rule("speedup over bf16", value["speedup.over_bf16"], ">=", gate.min_speedup_over_bf16, "of a denoising step"),
    ]
    if champion is not None:
        rules += _against_champion(gate, value, _Metrics(champion), same_machine)
    return rules


class _Metrics:
    """Metrics in which what was not measured is NaN."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self._values = values

    def __getitem__(self, name: str) -> float:
        return self._values.get(name, math.nan)


def _against_champion(gate: Gate, value: _Metrics, champion: _Metrics, same_machine: bool) -> list[Rule]:
    limits = [
        (
            f"{name} against champion",
            f"packed.{name}",
            ">=",
            champion[f"packed.{name}"] - gate.champion_accuracy_drop,
            f"share of prompts; champion {champion[f'packed.{name}']:.4g}",
        )
        for name in ACCURACIES
    ]
    psnr, error, speed = (champion[f] for f in ("packed.psnr_db", "packed.velocity_mse", "speedup.over_bf16"))
    limits += [
        ("psnr_db against champion", "packed.psnr_db", ">=", psnr - gate.champion_psnr_drop_db, f"dB; champion {psnr:.4g}"),
        (
            "velocity_mse against champion",
            "packed.velocity_mse",
            "<=",
            error * gate.champion_velocity_mse_ratio,
            f"champion {error:.4g}",
        ),
    ]
    if same_machine:
        limit = speed * gate.champion_speedup_ratio
        limits.append(("speedup against champion", "speedup.over_bf16", ">=", limit, f"over bf16; champion {speed:.4g}"))
    return [
        Rule(name, value[metric], sign, limit, words) for name, metric, sign, limit, words in limits if not math.isnan(limit)
    ]
