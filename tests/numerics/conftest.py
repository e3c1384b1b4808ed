"""What tests of single layers share."""

from collections.abc import Iterator

import pytest

from qvgen.nn.timestep import set_timestep


@pytest.fixture(autouse=True)
def _no_timestep_left_behind() -> Iterator[None]:
    yield
    set_timestep(None)
