"""What tests of compiled kernels share."""

from collections.abc import Callable, Iterator

import pytest

from qvgen.kernels.cpu import library
from qvgen.nn.timestep import set_timestep

ALWAYS, AS_AT_THE_START = 1, 0  # tokens from which "amx" uses tiles: qvgen_use_tiles


def _isas() -> tuple[list[str], str]:
    """Instruction sets that can run here, or why none can."""
    try:
        return library.supported_isas(), ""
    except library.LibraryMissing as error:
        return ["none"], str(error)


ISAS, MISSING = _isas()


@pytest.fixture(autouse=True)
def _compiled(request: pytest.FixtureRequest) -> None:
    if MISSING and (request.path.parent.name == "cpu" or "isa" in request.fixturenames):
        pytest.skip(MISSING)


@pytest.fixture(autouse=True)
def _no_timestep_left_behind() -> Iterator[None]:
    yield
    set_timestep(None)


def _id(name: str) -> str:
    return f"{name}-emulated" if not MISSING and library.load().qvgen_isa_emulated(name.encode()) else name


@pytest.fixture(params=ISAS, ids=_id)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The cpu backend in each instruction set that this machine can run; its name."""
    monkeypatch.setenv(library.ISA_ENVIRONMENT, request.param)
    library.isa.cache_clear()
    if request.param == "amx":
        library.load().qvgen_use_tiles(ALWAYS)  # else the few tokens that most tests have would go to registers
    yield request.param
    if request.param == "amx":
        library.load().qvgen_use_tiles(AS_AT_THE_START)
    library.isa.cache_clear()


@pytest.fixture
def strassen() -> Iterator[Callable[[int], None]]:
    """Sets the mode of Strassen's algorithm: 0 never, 1 where it is faster, 2 wherever it is possible."""
    yield library.load().qvgen_use_strassen
    library.load().qvgen_use_strassen(1)
