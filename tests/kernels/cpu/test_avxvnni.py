"""The AVX-VNNI path on a processor that has AVX-512 instead: the same source, its instruction in AVX-512's encoding."""

from pathlib import Path

import pytest

from qvgen.kernels.cpu import library
from tests.support.kernel_build import passed_with

pytestmark = pytest.mark.slow

TESTS = ["test_integer.py", "test_linear.py", "test_tokens.py"]


def test_the_path_passes_the_tests_of_the_others(tmp_path: Path) -> None:
    if "avxvnni" in library.supported_isas():
        pytest.skip("this processor has AVX-VNNI: the other tests run the path")
    if "avx512vnni" not in library.supported_isas():
        pytest.skip("this processor has neither AVX-VNNI nor AVX-512 VNNI")
    files = [f"tests/kernels/cpu/{name}" for name in TESTS]
    assert passed_with("-DQVGEN_AVXVNNI_AS_EVEX=ON", tmp_path, "-k", "avxvnni", *files) > 100
