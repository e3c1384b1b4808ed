from typing import Any

import pytest
from pydantic import ValidationError

from qvgen.quant.scheme import MAX_BITS, MIN_BITS, QuantArgs, QuantScheme


@pytest.mark.parametrize("num_bits", range(MIN_BITS, MAX_BITS + 1))
def test_codes_fill_their_bits(num_bits: int) -> None:
    args = QuantArgs(num_bits=num_bits)
    assert args.max_code.bit_length() == num_bits
    assert args.max_code + 1 == 2 * args.symmetric_zero_point


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_bits": 1}, "greater than or equal to 2"),
        ({"num_bits": 9}, "less than or equal to 8"),
        ({"num_bits": "4"}, "valid integer"),
        ({"strategy": "row"}, "'tensor', 'channel', 'group' or 'token'"),
        ({"strategy": "group"}, "strategy 'group' needs it"),
        ({"group_size": 32}, "group_size belongs to strategy 'group'"),
        ({"strategy": "group", "group_size": 1}, "greater than or equal to 2"),
        ({"symmetric": True, "zero_point_domain": "float"}, "no zero point to keep as float"),
        ({"bits": 4}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_quantizers_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        QuantArgs(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weights": QuantArgs(strategy="token")}, "weights have no tokens"),
        ({"input_activations": QuantArgs(strategy="channel")}, "strategy must be token"),
        (
            {"input_activations": QuantArgs(strategy="token", zero_point_domain="float")},
            "zero_point_domain must be integer",
        ),
        ({"timestep_groups": 0}, "greater than or equal to 1"),
        ({"targets": "Linear"}, "valid tuple"),
        ({"input_rotation": 24}, "input_rotation must be a power of two, found 24"),
        ({"input_rotation": 1}, "greater than or equal to 2"),
        ({"low_rank": -1}, "greater than or equal to 0"),
        ({"input_scaling": 1}, "valid boolean"),
    ],
)
def test_impossible_schemes_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        QuantScheme(**settings)


def test_name_is_the_fields_notation() -> None:
    assert QuantScheme().name == "W4A4"
    assert QuantScheme(weights=QuantArgs(num_bits=3), input_activations=None).name == "W3A16"


def test_schemes_are_frozen_and_comparable() -> None:
    scheme = QuantScheme()
    with pytest.raises(ValidationError, match="frozen"):
        scheme.timestep_groups = 1  # pyright: ignore[reportAttributeAccessIssue]
    assert scheme == QuantScheme()
    assert scheme != QuantScheme(timestep_groups=1)


def test_a_branch_is_at_most_a_sixteenth_of_the_layer() -> None:
    scheme = QuantScheme(low_rank=32)
    ranks = [scheme.rank_of(n, k) for n, k in ((1536, 8960), (512, 512), (128, 768), (768, 128), (24, 40), (4, 4))]
    assert ranks == [32, 32, 8, 8, 1, 1]
    assert QuantScheme().rank_of(128, 128) == 0


def test_a_rotation_divides_the_input() -> None:
    QuantScheme(input_rotation=128).check_rotation(8960)
    with pytest.raises(ValueError, match="in_features 40 is not a multiple of input_rotation 16; choose 8 or a smaller power"):
        QuantScheme(input_rotation=16).check_rotation(40)
