"""The `quantization_config` entry of a packed model's config.json: a QuantScheme, the number of packed layers, the format."""

from __future__ import annotations

import math
from typing import Any

from qvgen.quant.primitives import NUM_TRAIN_TIMESTEPS
from qvgen.quant.scheme import QuantScheme

FORMAT_VERSION = 1
METHOD = "qvgen"  # diffusers finds the code that loads the folder by this name
_GROUP = "group_0"
_LARGEST = "max_timestep"
_ENTRIES = {"quant_method", "format_version", "config_groups", "ignore"}  # diffusers adds none when it saves


def to_config(scheme: QuantScheme, num_targets: int, largest: float = NUM_TRAIN_TIMESTEPS) -> dict[str, Any]:
    """The entry for a model with `num_targets` layers packed by `scheme`, which is called with timesteps up to `largest`.
    Extras that are off leave no trace, nor does a `largest` of 1000, or one that nobody reads."""
    timestep = {} if scheme.timestep_groups == 1 or largest == NUM_TRAIN_TIMESTEPS else {_LARGEST: largest}
    return {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "config_groups": {
            _GROUP: {
                "targets": list(scheme.targets),
                "num_targets": num_targets,
                "weights": scheme.weights.model_dump(),
                "input_activations": scheme.input_activations and scheme.input_activations.model_dump(),
                "timestep_groups": scheme.timestep_groups,
                **timestep,
                **scheme.extras,
            }
        },
        "ignore": list(scheme.ignore),
    }


def from_config(config: dict[str, Any]) -> tuple[QuantScheme, int]:
    """Inverse of `to_config`: the scheme and the number of packed layers. Raises ValueError, naming the entry, for another
    format, an unknown or missing entry, and a value of another type."""
    if config.get("quant_method") != METHOD:
        raise ValueError(f"quant_method {config.get('quant_method')!r:.100} is not a model packed by qvgen")
    version = config.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:  # 1.0 and true are equal to 1
        raise ValueError(f"packed format version {version!r:.100}; this qvgen reads version {FORMAT_VERSION}")
    if unknown := sorted(config.keys() - _ENTRIES):
        raise ValueError(f"unknown entries {unknown!s:.200} in quantization_config; allowed: {', '.join(sorted(_ENTRIES))}")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or list(groups) != [_GROUP] or not isinstance(groups[_GROUP], dict):
        found = sorted(groups) if isinstance(groups, dict) else groups
        raise ValueError(f"expected one config group named {_GROUP}, found {found!r:.200}")
    group = dict(groups[_GROUP])
    num_targets = group.pop("num_targets", None)
    if type(num_targets) is not int:
        raise ValueError(f"config_groups.{_GROUP}.num_targets must be a number of layers, found {num_targets!r:.100}")
    largest_timestep(config)
    group.pop(_LARGEST, None)
    if "ignore" in group:
        raise ValueError(f"config_groups.{_GROUP}.ignore: ignore stands beside config_groups, not in a group")
    return QuantScheme(**group, ignore=config.get("ignore", ())), num_targets


def largest_timestep(config: dict[str, Any]) -> float:
    """The largest timestep that the model is called with. Raises ValueError for one that is no number above 0."""
    largest = config["config_groups"][_GROUP].get(_LARGEST, NUM_TRAIN_TIMESTEPS)
    if isinstance(largest, bool) or not isinstance(largest, int | float) or not 0 < largest < math.inf:
        raise ValueError(f"config_groups.{_GROUP}.{_LARGEST} = {largest!r:.100} must be a number above 0")
    return float(largest)
