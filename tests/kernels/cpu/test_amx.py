"""The AMX path on any x86 processor: the same source, its tile instructions in plain C++ (csrc/isa/tiles.h)."""

import platform
from pathlib import Path

import pytest

from tests.support.kernel_build import ROOT, passed_with

pytestmark = pytest.mark.slow


def test_emulated_tiles_pass_the_tests_of_the_others(tmp_path: Path) -> None:
    # Where the processor has AMX, the others run the path on its instructions besides.
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"the path is for x86-64, not for {platform.machine()}")
    selection = ["-k", "amx-emulated or tiles", "tests/kernels", "--ignore", Path(__file__).relative_to(ROOT)]
    assert passed_with("-DQVGEN_AMX_EMULATED=ON", tmp_path, *selection) > 400
