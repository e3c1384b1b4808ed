"""Which kernels `auto` takes: those that were measured to be fastest here, the same for every process."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qvgen.kernels.cpu import block_functions, choice, library
from qvgen.kernels.registry import ENVIRONMENT, KernelPreference
from qvgen.quant.scheme import QuantArgs, QuantScheme
from tests.support.packed_reference import build, scheme_of

Q = torch.ones(1, 65, 2, 64, dtype=torch.bfloat16)  # not a short sequence
MOST_SECONDS = 0.5  # of CPU time, measuring included


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and nothing measured yet; the folder of the files."""
    if not library.load().qvgen_isa_supported(b"portable"):
        pytest.skip("no instruction set runs here")
    for name in (ENVIRONMENT, library.ISA_ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "_known", [])
    library.isa.cache_clear()
    yield tmp_path / "qvgen" / "kernels"
    library.isa.cache_clear()


def candidates() -> list[str]:
    return [name for name in library.supported_isas() if not library.load().qvgen_isa_emulated(name.encode())]


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    linear: dict[str, float],
    attention: dict[str, float] | None = None,
    weight_only: dict[str, float] | None = None,
) -> None:
    monkeypatch.setattr(choice, "measure_linear", lambda names: linear)
    monkeypatch.setattr(choice, "measure_attention", lambda _: attention or {"avx512bf16": 1.0, choice.PYTORCH: 2.0})
    monkeypatch.setattr(choice, "measure_weight_only", lambda _: weight_only or {"cpu": 1.0, choice.PYTORCH: 2.0})


def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_known", [])


def test_what_was_measured_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    measured = choice.choice()
    assert torch.equal(torch.get_rng_state(), state)
    assert list(measured.linear_ms) == candidates()
    assert measured.linear_ms[measured.isa] <= choice.NOISE * min(measured.linear_ms.values())
    assert library.isa() == measured.isa.encode()
    (file,) = folder.iterdir()
    assert str(file) == measured.path
    assert json.loads(file.read_text())["linear_ms"] == measured.linear_ms
    pretend(monkeypatch, {"none": 0.0})
    another_process(monkeypatch)
    assert choice.choice() == measured


def test_measuring_is_short() -> None:
    if "ASAN_OPTIONS" in os.environ:
        pytest.skip("the sanitizers make kernels many times slower")
    library.isa()
    started = time.process_time()
    choice.choice(again=True)
    assert time.process_time() - started < MOST_SECONDS * torch.get_num_threads()


def test_the_fastest_is_chosen_and_of_equals_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *_, last = candidates()
    if first == last:
        pytest.skip(f"{first} is the only instruction set here")
    for slower, chosen in ((1.04, first), (1.06, last)):
        pretend(monkeypatch, {first: slower, last: 1.0})
        assert choice.choice(again=True).isa == chosen
    library.isa.cache_clear()
    assert library.isa() == last.encode()
    monkeypatch.setenv(library.ISA_ENVIRONMENT, first)
    library.isa.cache_clear()
    assert library.isa() == first.encode()


def test_measured_again_when_asked_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = candidates()[-1]
    pretend(monkeypatch, {name: 1.0})
    choice.choice()
    pretend(monkeypatch, {name: 2.0})
    assert choice.choice().linear_ms == {name: 1.0}
    assert choice.choice(again=True).linear_ms == {name: 2.0}
    another_process(monkeypatch)
    assert choice.choice().linear_ms == {name: 2.0}
    assert len(list(folder.iterdir())) == 1


def test_the_first_of_two_processes_decides_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    name = candidates()[-1]

    def slower_process(names: object) -> dict[str, float]:
        pretend(monkeypatch, {name: 1.0})
        choice._keep(choice._measure(candidates()), choice._path(candidates()), candidates(), False)
        return {name: 9.0}

    pretend(monkeypatch, {})
    monkeypatch.setattr(choice, "measure_linear", slower_process)
    assert choice.choice().linear_ms == {name: 1.0}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"isa": "sse9", "attention": "pytorch", "linear_ms": {}, "attention_ms": {}}']
)
def test_a_file_that_is_not_ours_is_replaced(content: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = candidates()[-1]
    pretend(monkeypatch, {name: 1.0})
    path = Path(choice.choice().path)
    path.write_text(content)
    another_process(monkeypatch)
    pretend(monkeypatch, {name: 3.0})
    assert choice.choice().linear_ms == {name: 3.0}
    assert json.loads(path.read_text())["isa"] == name


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    pretend(monkeypatch, {candidates()[-1]: 1.0})
    assert choice.choice().path == ""
    assert choice.choice().isa == candidates()[-1]


def test_other_instruction_sets_are_measured_for_themselves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {Path(choice.choice().path)}
    monkeypatch.setattr(library, "supported_isas", lambda: ["portable"])  # say, a sandbox that allows no tiles
    another_process(monkeypatch)
    assert choice.choice().isa == "portable"
    assert set(folder.iterdir()) == expected | {Path(choice.choice().path)}


def test_attention_goes_to_pytorch_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    if not library.attention_kernels(choice.FEATURES):
        pytest.skip("the compiled attention needs AVX512_BF16 or AMX, which this machine does not have")
    for ours, chosen in ((1.04, True), (1.06, False), (5.0, False)):
        pretend(monkeypatch, {candidates()[-1]: 1.0}, {"avx512bf16": ours, choice.PYTORCH: 1.0})
        assert choice.choice(again=True).attention == ("avx512bf16" if chosen else choice.PYTORCH)
        assert block_functions.attention_supported(Q, Q, Q) == chosen
        assert bool(block_functions.attention_refusal()) != chosen
    assert block_functions.attention_refusal() == "slower on this processor than PyTorch's: 5.00 ms against 1.00 (measured)"
    monkeypatch.setenv(ENVIRONMENT, "cpu")
    assert block_functions.attention_supported(Q, Q, Q)
    assert block_functions.attention_refusal() == ""


def test_weight_only_layers_go_to_pytorch_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = build(QuantScheme(weights=QuantArgs(), input_activations=None), 5, 32)
    for ours, chosen in ((1.04, "cpu"), (1.06, "reference")):
        pretend(monkeypatch, {candidates()[-1]: 1.0}, weight_only={"cpu": ours, choice.PYTORCH: 1.0})
        choice.choice(again=True)
        layer.prepare_backend()
        assert layer.backend == chosen
    layer.prepare_backend(KernelPreference.CPU)
    assert layer.backend == "cpu"
    quantized, _ = build(scheme_of(QuantArgs(), 4, 4, symmetric=False), 5, 32)
    quantized.prepare_backend()
    assert quantized.backend == "cpu"


def test_a_measurement_whose_halves_differ_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rounds of 1 ms, then of 4 ms (a slow phase of the processor), then of 1 ms again.
    durations = iter([1e-3] * 7 + [4e-3] * 5 + [1e-3] * 10)
    now, calls = [0.0], []

    def action() -> None:
        calls.append(1)
        now[0] += next(durations)

    assert choice._fastest({"a": action}, 10, lambda: now[0]) == {"a": 1.0}
    assert len(calls) == 22


def test_what_is_hopeless_is_not_measured_further() -> None:
    now, calls = [0.0], {"fast": 0, "slow": 0}

    def action(name: str, seconds: float) -> None:
        calls[name] += 1
        now[0] += seconds

    actions = {"fast": lambda: action("fast", 1e-3), "slow": lambda: action("slow", 5e-3)}
    assert choice._fastest(actions, 10, lambda: now[0]) == {"fast": 1.0, "slow": 5.0}
    assert calls == {"fast": 12, "slow": 2}


def test_emulated_instructions_are_never_chosen() -> None:
    emulated = set(library.supported_isas()) - set(candidates())
    if not emulated:
        pytest.skip("this build emulates nothing (test_amx.py builds one that does)")
    assert not emulated & choice.choice().linear_ms.keys()


def test_a_forked_child_knows_it_too() -> None:
    known = choice.choice()
    child = os.fork()
    if child == 0:
        os._exit(0 if choice.choice() == known else 1)
    assert os.waitpid(child, 0)[1] == 0
