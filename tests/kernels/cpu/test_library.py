"""The library as a file, which instruction sets it has here, and what happens without it."""

import logging
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qvgen.kernels import registry
from qvgen.kernels.cpu import library
from qvgen.kernels.cpu.backend import CpuBackend
from qvgen.kernels.cpu.choice import choice
from qvgen.kernels.registry import KernelPreference
from qvgen.nn.timestep import set_timestep
from qvgen.quant.scheme import QuantArgs
from tests.support.packed_reference import assert_equals_reference, build, inputs, scheme_of

SCHEME = scheme_of(QuantArgs(), 4, 4, symmetric=False)


def built_isas() -> list[str]:
    """Instruction sets that this build has code for."""
    try:
        names = library.load().qvgen_isas()
    except library.LibraryMissing:
        return ["none"]  # and conftest.py skips the tests
    return [name.decode() for name in iter(iter(names).__next__, None)]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_announced", set())
    monkeypatch.setattr(registry._log, "disabled", False)  # which dvc and alembic do to loggers when they set up their own
    library.isa.cache_clear()
    yield
    library.isa.cache_clear()


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "libqvgen_cpu.so"
    monkeypatch.setattr(library, "_candidates", lambda: [path])
    monkeypatch.delenv(library.LIBRARY_ENVIRONMENT, raising=False)
    monkeypatch.setattr(library, "load", library.load.__wrapped__)  # without its cache
    return path


def test_what_every_processor_runs_uses_no_newer_registers() -> None:
    """Loading asks for every instruction set; what answers is compiled with the flags of that set."""
    if not (objdump := shutil.which("objdump")):
        pytest.skip("objdump (binutils) is not installed")
    for name in (*built_isas(), "attention_avx512bf16", "attention_amx"):
        function = name if name.startswith("attention") else f"isa_{name}"
        symbol = f"_ZN5qvgen{len(function)}{function}Ev"
        command = [objdump, "--disassemble=" + symbol, "--no-show-raw-insn", library.load()._name]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        if name != "amx":  # put together at run time, in a file without flags
            assert symbol in code and not re.search(r"%[yz]mm", code), code


@pytest.mark.parametrize("name", built_isas())
def test_each_instruction_set_of_the_build_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not library.load().qvgen_isa_supported(name.encode()):
        pytest.skip(f"this machine does not have {name}; it ran {', '.join(library.supported_isas())}")
    monkeypatch.setenv(library.ISA_ENVIRONMENT, name)
    assert library.isa() == name.encode()
    layer, _ = build(SCHEME, 70, 100)
    layer.prepare_backend(KernelPreference.CPU)
    assert_equals_reference(layer, inputs(2, 7, 100), torch.tensor([0.0, 900.0]))


def test_the_fastest_instruction_set_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.ISA_ENVIRONMENT, raising=False)
    supported = library.supported_isas()
    assert supported == [name for name in built_isas() if library.load().qvgen_isa_supported(name.encode())]
    assert supported[-1] == "portable"
    assert library.isa() == choice().isa.encode()
    assert choice().isa in supported


def test_an_instruction_set_that_is_refused_says_why() -> None:
    refusals = library.refusals()
    assert not set(refusals) & set(library.supported_isas())
    if "amx" in built_isas() and "amx" not in library.supported_isas():
        assert refusals["amx"].startswith(("this processor does not have AMX", "the operating system", "AVX512_BF16"))


@pytest.mark.parametrize("lacking", ["unknown", "unsupported"])
def test_an_instruction_set_that_cannot_run(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacking == "unsupported":
        monkeypatch.setattr(library, "supported_isas", lambda: ["portable"])
    name = {"unknown": "sse9", "unsupported": built_isas()[0]}[lacking]
    choices = ", ".join(library.supported_isas())
    monkeypatch.setenv(library.ISA_ENVIRONMENT, name)
    with pytest.raises(ValueError, match=f"QVGEN_CPU_ISA='{name}' cannot run here; this machine has {choices}$"):
        library.isa()
    assert f"this machine has {choices}" in CpuBackend().available()
    layer, _ = build(SCHEME, 5, 32)
    with pytest.raises(RuntimeError, match=f"'cpu' was asked for and cannot run: QVGEN_CPU_ISA='{name}'"):
        layer.prepare_backend(KernelPreference.CPU)


def test_the_library_itself_refuses_an_unknown_instruction_set() -> None:
    layer, _ = build(SCHEME, 5, 32)
    layer.prepare_backend(KernelPreference.CPU)
    set_timestep(torch.tensor([0.0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "isa", lambda: b"sse9")
        with pytest.raises(RuntimeError, match="this machine does not have the instruction set"):
            layer(inputs(2, 3, 32))
    assert not library.load().qvgen_isa_supported(b"sse9")


def test_it_links_neither_torch_nor_python() -> None:
    if (readelf := shutil.which("readelf")) is None:
        pytest.skip("readelf (binutils) is not installed")
    dynamic = subprocess.run([readelf, "-d", library.load()._name], check=True, capture_output=True, text=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert any(name.startswith("libc.so") for name in needed), dynamic
    assert [name for name in needed if name.startswith(("libtorch", "libc10", "libpython", "libgomp", "libomp"))] == []


def test_without_the_library_auto_takes_the_reference(without_library: Path, caplog: pytest.LogCaptureFixture) -> None:
    reason = CpuBackend().available()
    assert reason.startswith("the compiled kernels are not installed")
    assert "apt install g++" in reason
    with caplog.at_level(logging.INFO, logger="qvgen"):
        for _ in range(3):
            layer, _ = build(SCHEME, 5, 32)
            assert_equals_reference(layer, inputs(2, 3, 32), torch.tensor([0.0]))
            layer.prepare_backend()
            assert layer.backend == "reference"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"cpu: {reason}" in record.message
    with pytest.raises(RuntimeError, match="'cpu' was asked for and cannot run: the compiled kernels are not installed"):
        layer.prepare_backend(KernelPreference.CPU)


def test_a_library_that_does_not_load(without_library: Path) -> None:
    without_library.write_bytes(b"not a library")
    assert f"{without_library} does not load" in CpuBackend().available()


def test_a_library_of_another_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "other.so"
    monkeypatch.setenv(library.LIBRARY_ENVIRONMENT, str(path))
    assert library._candidates() == [path]
    with pytest.raises(library.LibraryMissing, match=f"QVGEN_CPU_LIBRARY names {path}, which does not exist"):
        library.load.__wrapped__()
    monkeypatch.setenv(library.LIBRARY_ENVIRONMENT, "")
    assert path not in library._candidates()
