"""The library as Clang builds it: what GCC takes, it does not always."""

from pathlib import Path

import pytest

from tests.support.kernel_build import passed_with

pytestmark = pytest.mark.slow


def test_clang_builds_what_passes_the_tests(tmp_path: Path) -> None:
    tests = [f"tests/kernels/{name}" for name in ("test_whole_block.py", "cpu/test_linear.py", "cpu/test_tokens.py")]
    assert passed_with("-DCMAKE_BUILD_TYPE=Release", tmp_path, *tests, compiler="clang++") > 100
