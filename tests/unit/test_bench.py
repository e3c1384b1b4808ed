"""The benchmarks run, and their files say what was measured. How fast anything is, is not tested."""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import choice as bench_choice
from bench import linear
from bench.dit_step import __main__ as dit_step
from bench.dit_step.breakdown import PARTS
from bench.dit_step.models import token_grid
from bench.machine import last_level_cache
from bench.report import geometric_mean, write_json
from bench.variants import OURS, VARIANTS, Problem, Unavailable
from qvgen.evaluation.cost.hardware import hardware
from qvgen.evaluation.cost.speed import quartiles, time_calls
from qvgen.kernels.cpu import choice, library
from qvgen.kernels.cpu.backend import CpuBackend

ROOT = Path(__file__).parents[2]
# Output of W4A4 relative to float32: normal values on 15 steps between their extremes, weights and inputs.
ROUNDING_W4A4 = 0.25


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "linear.json"
    command = ["-m", "bench.linear", "--m", "1,8", "--shapes", "64x64", "--repetitions", "2", "--threads", "1", "--json"]
    done = subprocess.run([sys.executable, *command, str(path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 x 64 x 64" in done.stdout and "geometric mean" in done.stdout
    return json.loads(path.read_text())


@pytest.mark.slow
def test_linear_rows(rows: dict[str, Any]) -> None:
    assert [(r["m"], r["k"], r["n"], r["threads"]) for r in rows["rows"]] == [(1, 64, 64, 1), (8, 64, 64, 1)]
    assert rows["device"].keys() == hardware().keys()
    for row in rows["rows"]:
        assert (row["weight_bits"], row["activation_bits"], row["clock"]) == (4, 4, "cpu")
        assert {"torch_fp32", "torch_bf16"} <= set(row["speedup"]) < set(VARIANTS)
        assert set(row["ms"]) == set(row["rounds_ms"]) == set(row["wall_ms"]) == {OURS, *row["speedup"]}
        assert row["peak_fraction"] is None or 0 < row["peak_fraction"] < 1


@pytest.mark.slow
def test_speedups_are_medians_of_the_rounds_ratios(rows: dict[str, Any]) -> None:
    for row in rows["rows"]:
        ours = row["rounds_ms"][OURS]
        for name, speedup in row["speedup"].items():
            ratios = [other / mine for other, mine in zip(row["rounds_ms"][name], ours, strict=True)]
            assert speedup == pytest.approx(statistics.median(ratios))
            assert row["quartiles"][name] == pytest.approx(list(quartiles(ratios))[::2])
            assert row["ms"][name] == pytest.approx(statistics.median(row["rounds_ms"][name]))
    for name, mean in rows["geometric_mean"]["1"].items():
        assert mean == pytest.approx(geometric_mean(row["speedup"][name] for row in rows["rows"]))


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_every_variant_computes_the_layer(name: str) -> None:
    problem = Problem.random(m=8, k=256, n=64)
    try:
        make = VARIANTS[name][0](problem)
    except Unavailable as reason:
        pytest.skip(f"{name}: {reason}")
    expected = torch.nn.functional.linear(problem.x, problem.weight, None if name == "int4pack" else problem.bias)
    for action in (make(), make()):  # two copies
        output = action().float()
        assert output.shape == expected.shape
        assert (output - expected).norm() < ROUNDING_W4A4 * expected.norm()


@pytest.mark.parametrize(("m", "copies"), [(1, 3), (2, 1)])
def test_one_row_rotates_over_more_than_the_cache(m: int, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "last_level_cache", lambda threads: 64 * 64 * 4 * copies // linear.COLD_CACHE)
    used: list[int] = []

    def variant(problem: Problem) -> Any:
        made = iter(range(100))

        def make() -> Any:
            copy = next(made)
            return lambda: used.append(copy)

        return make

    monkeypatch.setitem(linear.VARIANTS, "torch_fp32", (variant, 32))
    action = linear.build("torch_fp32", Problem.random(m, 64, 64), threads=1)
    assert action is not None
    for _ in range(2 * copies):
        action()
    assert used == [*range(copies)] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--shapes", "64"], "--shapes"), (["--m", "0"], "--m"), (["--repetitions", "1"], "at least 2 repetitions")],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        linear.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(bool(CpuBackend().available()), reason="there are no compiled kernels")
def test_an_instruction_set_that_is_not_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("QVGEN_CPU_ISA", "")  # so that it is restored
    library.isa.cache_clear()
    with pytest.raises(SystemExit, match="2"):
        linear.main(["--isa", "mmx"])
    assert "'mmx' cannot run here" in capsys.readouterr().err


def test_a_denoising_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    memory = {"imports": 1.0, "loaded": 2.0, "peak": 3.0, "load_s": 0.5}
    monkeypatch.setattr(dit_step, "peak_memory_mb", lambda *_: memory)  # fresh processes: tested in test_speed.py
    path = tmp_path / "step.json"
    threads = torch.get_num_threads()
    dit_step.main(
        [
            "--model",
            "tiny",
            "--tokens",
            "16",
            "--layers",
            "1",
            "--threads",
            "1",
            *["--repetitions", "2"],
            *["--json", str(path)],
        ]
    )
    assert torch.get_num_threads() == threads
    assert "packed_unfused" in capsys.readouterr().out

    content = json.loads(path.read_text())
    assert (content["model"], content["tokens"], content["layers"], content["clock"]) == ("tiny", 16, 1, "cpu")
    step = content["step_ms"]
    assert list(step) == ["fp32", "bf16", "packed", "packed_unfused"]
    for name in ("fp32", "bf16", "packed_unfused"):
        assert content["speedup"][f"over_{name}"] == step[name] / step["packed"]
    assert set(content["breakdown_ms"]) == {*PARTS, "rest"}
    assert all(ms > 0 for ms in content["breakdown_ms"].values())
    assert content["load_s"] == dict.fromkeys(("fp32", "bf16", "packed"), 0.5)
    for key in ("weight_bytes", "block_bytes", "file_bytes"):
        assert content[key]["packed"] < content[key]["bf16"] < content[key]["fp32"]
    assert content["device"]["threads"] == 1


def test_tokens_are_frames_of_480p_or_one_frame() -> None:
    assert token_grid(1560) == (1, 30, 52)
    assert token_grid(4680) == (3, 30, 52)
    assert token_grid(16) == (1, 4, 4)
    assert token_grid(7) == (1, 1, 7)


def test_short_actions_are_repeated_and_reported_per_call() -> None:
    calls: list[int] = []
    samples = time_calls({"a": lambda: calls.append(1)}, 2, least_seconds=1e-3)["a"]
    assert len(calls) > 100
    assert len(samples.wall) == len(samples.cpu) == 2
    assert max(samples.wall) < 1e-4


def test_the_last_level_cache_is_known() -> None:
    assert 2**18 < last_level_cache(1) <= last_level_cache(64)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new/file.json"
    for value in (1, 2):
        write_json(path, {"value": value})
        assert json.loads(path.read_text()) == {"value": value}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("slowed", [False, True])
def test_a_slower_choice_is_reported(
    slowed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = choice.Choice(
        "b", choice.PYTORCH, {"a": 1.0, "b": 1.0}, {"a": 2.0, choice.PYTORCH: 1.0}, {"cpu": 2.0, choice.PYTORCH: 1.0}, ""
    )
    monkeypatch.setattr(choice, "choice", lambda: taken)
    monkeypatch.setattr(library, "supported_isas", lambda: ["a", "b", "c"])
    monkeypatch.setattr(choice, "measure_linear", lambda names, *_: {"a": 1.0, "b": 2.0 if slowed else 1.05})
    monkeypatch.setattr(choice, "measure_attention", lambda *_: {"a": 2.0, choice.PYTORCH: 1.0})
    monkeypatch.setattr(choice, "measure_weight_only", lambda *_: {"cpu": 2.0, choice.PYTORCH: 1.0})
    assert bench_choice.main([]) == slowed
    said = capsys.readouterr().out
    assert said.count("slower") == (len(bench_choice.LAYERS) if slowed else 0)
    assert "attention 1560" in said
    assert "weight-only 1560" in said


def test_choices_are_measured() -> None:
    try:
        library.load()
    except library.LibraryMissing as reason:
        pytest.skip(str(reason))
    assert bench_choice.main(["--smallest"]) in (0, 1)
