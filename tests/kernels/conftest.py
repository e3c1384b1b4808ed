"""What tests of compiled kernels share."""

from collections.abc import Callable, Iterator

import pytest

from qvgen.kernels.cpu import library


def _isas() -> list[str]:
    try:
        return library.supported_isas()
    except library.LibraryMissing as error:
        return [f"none: {error}"]


@pytest.fixture(params=_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The cpu backend in each instruction set that this machine can run; its name."""
    if request.param.startswith("none"):
        pytest.skip(request.param)
    monkeypatch.setenv(library.ISA_ENVIRONMENT, request.param)
    library.isa.cache_clear()
    yield request.param
    library.isa.cache_clear()


@pytest.fixture
def strassen() -> Iterator[Callable[[int], None]]:
    """Sets the mode of Strassen's algorithm: 0 never, 1 where it is faster, 2 wherever it is possible."""
    yield library.load().qvgen_use_strassen
    library.load().qvgen_use_strassen(1)
