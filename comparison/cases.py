"""Which cases there are, and the parameters of each.

A case is one method at one bit width with one seed, perhaps with one variant of its settings. It runs with the project's
params.yaml, changed by comparison/params.yaml and by what the case itself is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qvgen.methods.registry import METHODS
from qvgen.params import Params, ParamsError, validate_params

FOLDER = Path("comparison")
RESULTS = FOLDER / "results"
CLIPS = FOLDER / "clips"
REFERENCE = FOLDER / "artifacts/reference"
RATES = FOLDER / "learning_rates.json"
FULL_PRECISION = "full_precision"
# A look at the order of things: one seed, one bit width, no search of learning rates (the recorded ones are used).
FAST = ("rtn", "mse", "svdquant", "kd", "qvgen", "qvgen+")


@dataclass(frozen=True)
class Case:
    """`variant` names an entry of comparison/params.yaml's `variants`; `percent` is the learning rate in percent of that of
    params.yaml, None if it is the one that tuning chose."""

    method: str
    bits: str
    seed: int
    variant: str = ""
    percent: int | None = None

    @property
    def name(self) -> str:
        parts = [self.method, self.bits, str(self.seed)]
        parts += [self.variant] if self.variant else []
        parts += [f"lr{self.percent}"] if self.percent is not None else []
        return "-".join(parts)

    @property
    def group(self) -> str:
        if self.percent is not None:
            return "tuning"
        if self.variant:
            return "ablation"
        return "main" if self.bits in ("W4A4", "W3A3") else "low"


def read_settings(root: Path) -> dict[str, Any]:
    """comparison/params.yaml: revisions, cases, overrides, main_prompts, clips, variants."""
    return yaml.safe_load((root / FOLDER / "params.yaml").read_text())


def tuning_cases(settings: dict[str, Any]) -> list[Case]:
    """The cases that choose learning rates: the same five for each trained method, with a seed of their own."""
    tuning = settings["cases"]["tuning"]
    trained = [name for name, method in METHODS.items() if method.trained]
    return [Case(m, tuning["bits"], tuning["seed"], percent=percent) for m in trained for percent in tuning["percents"]]


def scored_cases(settings: dict[str, Any]) -> list[Case]:
    """The cases that the report compares: every method, fewer bits, single settings changed, more steps."""
    cases = settings["cases"]
    seeds, low, ablation, longer = cases["seeds"], cases["low"], cases["ablation"], cases["longer"]
    return [
        *(Case(method, bits, seed) for seed in seeds for bits in cases["bits"] for method in METHODS),
        *(Case(method, bits, seed) for seed in seeds for bits in low["bits"] for method in low["methods"]),
        *(
            Case(ablation["method"], ablation["bits"], seed, variant)
            for seed in seeds
            for variant in settings["variants"]
            if variant != "longer"
        ),
        *(Case(method, bits, seeds[0], "longer") for bits in cases["bits"] for method in longer["methods"]),
    ]


def fast_cases(settings: dict[str, Any]) -> list[Case]:
    return [Case(method, settings["cases"]["bits"][0], settings["cases"]["seeds"][0]) for method in FAST]


def case_params(root: Path, case: Case, factor: float = 1.0) -> Params:
    """Checked parameters of a case; `factor` multiplies the learning rate of weights and Φ.

    Raises ParamsError for settings that are not possible together, ValueError for an unknown variant.
    """
    settings = read_settings(root)
    if case.variant and case.variant not in settings["variants"]:
        raise ValueError(f"variant {case.variant!r} is not in comparison/params.yaml: {', '.join(settings['variants'])}")
    tree = yaml.safe_load((root / "params.yaml").read_text())
    _merge(tree, settings["overrides"])
    _merge(tree, settings["variants"][case.variant] if case.variant else {})
    weights, activations = parse_bits(case.bits)
    tree["method"], tree["seed"] = case.method, case.seed
    tree["evaluate"]["prompts_file"] = None  # its trial is one of held-out captions
    tree["scheme"]["weights"]["num_bits"], tree["scheme"]["input_activations"]["num_bits"] = weights, activations
    tree["qat"]["learning_rate"] *= factor
    if case.group in ("main", "low"):
        tree["evaluate"]["prompts"] = settings["main_prompts"]
    return validate_params(tree, f"params.yaml with comparison/params.yaml, case {case.name}")


def reference_params(root: Path) -> Params:
    """Parameters of the full-precision reference, and of the trial that every case is put to (some to its first prompts
    only): those of seed 0."""
    return case_params(root, Case("rtn", "W4A4", 0))


def parse_bits(bits: str) -> tuple[int, int]:
    """ "W4A8" -> (4, 8). Raises ParamsError for anything else."""
    weights, _, activations = bits.removeprefix("W").partition("A")
    if not (bits.startswith("W") and weights.isdigit() and activations.isdigit()):
        raise ParamsError(f"bits {bits!r}: write them as W4A4")
    return int(weights), int(activations)


def read_factor(root: Path, method: str) -> float:
    """The learning-rate factor that tuning chose for a method; 1 for one that does not train."""
    return json.loads((root / RATES).read_text())["chosen"][method] if METHODS[method].trained else 1.0


def _merge(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value
