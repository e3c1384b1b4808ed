"""The `quantization_config` entry of a packed model's config.json: a QuantScheme, the number of packed layers, the format."""

from __future__ import annotations

from typing import Any

from qvgen.quant.scheme import QuantScheme

FORMAT_VERSION = 1
METHOD = "qvgen"  # diffusers finds the code that loads the folder by this name
_GROUP = "group_0"


def to_config(scheme: QuantScheme, num_targets: int) -> dict[str, Any]:
    """The entry for a model with `num_targets` layers packed by `scheme`. Extras that are off leave no trace."""
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
                **scheme.extras,
            }
        },
        "ignore": list(scheme.ignore),
    }


def from_config(config: dict[str, Any]) -> tuple[QuantScheme, int]:
    """Inverse of `to_config`: the scheme and the number of packed layers. Raises ValueError on another format."""
    if config.get("quant_method") != METHOD:
        raise ValueError(f"quant_method {config.get('quant_method')!r} is not a model packed by qvgen")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"packed format version {version!r}; this qvgen reads version {FORMAT_VERSION}")
    groups = config.get("config_groups") or {}
    if list(groups) != [_GROUP]:
        raise ValueError(f"expected one config group named {_GROUP}, found {sorted(groups)}")
    group = dict(groups[_GROUP])
    num_targets = group.pop("num_targets", None)
    if not isinstance(num_targets, int):
        raise ValueError(f"config_groups.{_GROUP}.num_targets must be a number of layers, found {num_targets!r}")
    return QuantScheme(**group, ignore=tuple(config.get("ignore", ()))), num_targets
