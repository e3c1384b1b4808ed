"""The gate of section `gate` in params.yaml: may this model become champion? Numbers only; nothing is read or written."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from qvgen.gate import ChampionLimit, Gate, Limit


@dataclass(frozen=True)
class Rule:
    """One limit and the value held against it; `value` is NaN if it was not measured."""

    name: str
    value: float
    sign: str  # "<=" or ">="
    limit: float
    words: str
    applies: bool = True  # False: the data set cannot give the metric, as stage evaluate says

    @property
    def ok(self) -> bool:
        """A value that is NaN passes nothing that applies."""
        return not self.applies or (self.value <= self.limit if self.sign == "<=" else self.value >= self.limit)

    @property
    def known(self) -> float | None:
        """`value`, or None if it was not measured: JSON has no NaN."""
        return None if math.isnan(self.value) else self.value

    @property
    def limit_text(self) -> str:
        return f"{self.sign} {self.limit:.5g}"

    def __str__(self) -> str:
        value = "not measured" if math.isnan(self.value) else f"{self.value:.5g}"
        if not self.applies:
            return f"N/A   {self.name:<28}{'-':>13} {self.limit_text:<12} {self.words}: not applicable to this data"
        return f"{'PASS' if self.ok else 'FAIL'}  {self.name:<28}{value:>13} {self.limit_text:<12} {self.words}"


def evaluate_gate(
    gate: Gate,
    challenger: Mapping[str, float],
    champion: Mapping[str, float] | None,
    *,
    same_machine: bool = True,
    not_applicable: Collection[str] = (),
) -> list[Rule]:
    """Every rule of `gate`. `challenger` and `champion` are metrics as stage register records them, by dotted name.

    A metric that is missing fails its rule, unless stage evaluate declared that the data cannot give it (`not_applicable`,
    last parts of names): then the rule is there and does not apply. Without a champion its rules are left out; so is what is
    compared on the same machine only, unless both were measured there, and what the champion has no number for.
    """
    value = _Metrics(challenger)

    def applies(*metrics: str | None) -> bool:
        missing = [name for name in metrics if name is not None and math.isnan(value[name])]
        return not any(name.rpartition(".")[2] in not_applicable for name in missing)

    rules = [
        Rule(name, _held(limit, value), *_side(limit), _words(limit), applies(limit.metric, limit.minus, limit.over))
        for name, limit in gate.rules.items()
    ]
    if champion is not None:
        before = _Metrics(champion)
        for name, limit in gate.champion.items():
            bar = _bar(limit, before[limit.metric])
            if math.isnan(bar) or (limit.same_machine and not same_machine):
                continue
            words = f"{limit.metric}; champion {before[limit.metric]:.4g}"
            sign = ">=" if limit.max_ratio is None else "<="
            rules.append(Rule(f"{name} against champion", value[limit.metric], sign, bar, words, applies(limit.metric)))
    return rules


class _Metrics:
    """Metrics in which a value that was not measured is NaN."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self._values = values

    def __getitem__(self, name: str) -> float:
        return self._values.get(name, math.nan)


def _held(limit: Limit, value: _Metrics) -> float:
    """The value that a limit is held against: a metric, a difference or a ratio."""
    found = value[limit.metric]
    if limit.minus is not None:
        found -= value[limit.minus]
    if limit.over is not None:
        found = found / value[limit.over] if value[limit.over] else math.nan
    return found


def _side(limit: Limit) -> tuple[str, float]:
    """Sign and number of a limit, which has one of the two."""
    if limit.max is not None:
        return "<=", limit.max
    assert limit.min is not None
    return ">=", limit.min


def _words(limit: Limit) -> str:
    minus = f" - {limit.minus}" if limit.minus is not None else ""
    over = f" / {limit.over}" if limit.over is not None else ""
    return f"{limit.metric}{minus}{over}"


def _bar(limit: ChampionLimit, champion: float) -> float:
    """The limit that a champion's number sets; NaN if it has none."""
    if limit.max_drop is not None:
        return champion - limit.max_drop
    ratio = limit.max_ratio if limit.max_ratio is not None else limit.min_ratio
    assert ratio is not None
    return champion * ratio
