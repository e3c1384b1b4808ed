import json
from typing import Any

import pytest
from pydantic import ValidationError

from qvgen.packing.config import FORMAT_VERSION, from_config, largest_timestep, to_config
from qvgen.quant.scheme import QuantArgs, QuantScheme


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(),
        QuantScheme(input_activations=None),
        QuantScheme(weights=QuantArgs(num_bits=8, strategy="group", group_size=64, symmetric=True)),
        QuantScheme(targets=("Linear", "re:blocks.*"), ignore=("proj_out",), timestep_groups=7),
        QuantScheme(input_scaling=True, input_rotation=64, low_rank=32),
    ],
)
def test_config_json_round_trip(scheme: QuantScheme) -> None:
    config = json.loads(json.dumps(to_config(scheme, num_targets=40)))
    assert config["quant_method"] == "qvgen"
    assert from_config(config) == (scheme, 40)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format_version": FORMAT_VERSION + 1}, f"this qvgen reads version {FORMAT_VERSION}"),
        ({"format_version": None}, "packed format version None"),
        ({"format_version": 1.0}, r"packed format version 1\.0"),
        ({"format_version": True}, "packed format version True"),
        ({"surprise": 1}, r"unknown entries \['surprise'\] in quantization_config; allowed: config_groups, format_version"),
        ({"config_groups": None}, "one config group named group_0, found None"),
        ({"config_groups": 5}, "found 5"),
        ({"config_groups": {"group_0": []}}, "one config group named group_0"),
        ({"ignore": 0.5}, "ignore"),
        ({"ignore": [1]}, "ignore"),
        ({"ignore": "proj_out"}, "ignore"),
        ({"config_groups": {}}, "one config group named group_0, found \\[\\]"),
        ({"config_groups": {"group_0": {}, "group_1": {}}}, "found \\['group_0', 'group_1'\\]"),
    ],
)
def test_foreign_configs_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_config(to_config(QuantScheme(), num_targets=1) | changes)


def test_an_unknown_key_in_config_json_is_refused() -> None:
    config = to_config(QuantScheme(), num_targets=1)
    config["config_groups"]["group_0"]["surprise"] = 1
    with pytest.raises(ValidationError, match="surprise"):
        from_config(config)


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_a_number_of_layers_is_an_integer(value: Any) -> None:
    config = to_config(QuantScheme(), num_targets=1)
    config["config_groups"]["group_0"]["num_targets"] = value
    with pytest.raises(ValueError, match="num_targets must be a number of layers, found"):
        from_config(config)


@pytest.mark.parametrize("value", [True, 0, -1, float("nan"), float("inf"), "1", [1], None])
def test_a_largest_timestep_is_a_number_above_0(value: Any) -> None:
    config = to_config(QuantScheme(), num_targets=1)
    config["config_groups"]["group_0"]["max_timestep"] = value
    with pytest.raises(ValueError, match=r"max_timestep = .* must be a number above 0"):
        from_config(config)


def test_ignore_stands_beside_the_groups() -> None:
    config = to_config(QuantScheme(), num_targets=1)
    config["config_groups"]["group_0"]["ignore"] = []
    with pytest.raises(ValueError, match="ignore stands beside config_groups"):
        from_config(config)


def test_what_is_off_leaves_no_trace_in_config_json() -> None:
    """Packed folders of plain schemes keep their bytes, and older ones their meaning."""
    group = to_config(QuantScheme(), num_targets=1)["config_groups"]["group_0"]
    assert list(group) == ["targets", "num_targets", "weights", "input_activations", "timestep_groups"]
    group = to_config(QuantScheme(low_rank=4), num_targets=1)["config_groups"]["group_0"]
    assert group["low_rank"] == 4 and "input_scaling" not in group
    one = QuantScheme(timestep_groups=1)  # for which no timestep is read
    for scheme, largest, stored in ((QuantScheme(), 1.0, 1.0), (QuantScheme(), 1000.0, None), (one, 1.0, None)):
        config = to_config(scheme, 1, largest)
        assert config["config_groups"]["group_0"].get("max_timestep") == stored
        assert from_config(config) == (scheme, 1) and largest_timestep(config) == (stored or 1000)
