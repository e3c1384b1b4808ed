"""`make gpu` runs whatever of it a CPU can run; what its parts end in is reported, and how fast anything is, is not tested."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.dit_step import __main__ as dit_step
from bench.dit_step import gpu as step_on_gpu
from bench.dit_step import models as step_models
from bench.gpu import __main__ as bench_gpu
from bench.gpu import embedded, parts, qat_step
from bench.gpu.parts import PARTS, SMALLEST, Part, Result, run_all
from bench.gpu.table import markdown, rows_of, targets
from bench.gpu.timing import rounds_within
from bench.roofline import CARDS, MODELS, TEXT_TOKENS, milliseconds, packed_step
from bench.variants import ON_GPUS as LINEARS
from bench.variants import Problem, Unavailable
from qvgen.kernels.triton import backend

ROOT = Path(__file__).parents[2]
NO_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
ROUNDING_W4A4 = 0.25  # as tests/unit/test_bench.py
NOT_NEEDED = ("prefect", "dvc", "mlflow")


@pytest.mark.slow
@NO_CARD
def test_without_a_card_and_without_the_packages_that_it_does_not_need() -> None:
    script = f"""
import sys
for name in {NOT_NEEDED}:
    sys.modules[name] = None
import bench.gpu.embedded, bench.gpu.qat_step, bench.linear, bench.dit_step.__main__, bench.gpu.__main__
import tests.integration.conftest, tests.integration.test_diffusers_features
sys.exit(bench.gpu.__main__.main([]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no GPU to test on: ") and done.stdout.count("\n") == 1


def test_a_card_that_cannot_be_used_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(backend, "refusal", lambda: "too old")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench_gpu.main([]) == 1
    assert capsys.readouterr().out == "no GPU to test on: too old\n"


def python(script: str, json_file: bool = True) -> tuple[str, ...]:
    writes = "import sys, json; json.dump({'difference': 1}, open(sys.argv[-1], 'w'));" if json_file else ""
    return ("-c", writes + script)


def test_a_part_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    memory = "raise type('OutOfMemoryError', (Exception,), {})('CUDA out of memory. Tried to allocate 9.00 GiB.')"
    some = (
        Part("memory", 1, python(memory)),
        Part("fails", 1, python("sys.exit('what went wrong')")),
        Part("endless", 0.5, python("import time; print(0, flush=True); time.sleep(600)", json_file=False), json=False),
        Part("good", 1, python("")),
        Part("tests", 30, python("print('== 3 passed in 1 s ==')", json_file=False), json=False),
    )
    said: list[str] = []
    results = {result.part: result for result in run_all(some, 120, tmp_path, said.append)}
    assert list(results) == [part.name for part in some] and len(said) == len(some)
    assert "Tried to allocate 9.00 GiB" in results["memory"].status and "fewer layers" in results["memory"].status
    assert results["fails"].status == "failed with status 1: what went wrong"
    assert "was ended" in results["endless"].status and results["endless"].seconds < 60
    assert results["good"] == Result("good", "ok", results["good"].seconds, {"difference": 1})
    assert results["tests"].content == {"summary": "3 passed in 1 s"}
    assert run_all(some[-1:], 0, tmp_path, said.append)[0].status == "not started: no time was left"


def test_the_parts_are_all_that_is_asked_for_and_fit_the_time() -> None:
    named = {part.name for part in PARTS}
    steps = {f"step-{model}-{frames}" for model in ("wan2.1-1.3b", "wan2.1-14b", "cogvideox-2b") for frames in (49, 81)}
    assert named == {"tests", "linear", "embedded", "qat-step"} | steps
    assert bench_gpu.LIMIT_S < 9 * 60
    assert all(Path(ROOT / test).exists() for test in parts.TESTS)
    assert {part.name for part in SMALLEST} - {"step-tiny-1"} < named


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """What the parts write at their smallest, in this process."""
    folder, found = tmp_path_factory.mktemp("parts"), []
    mains: dict[str, Any] = {
        "bench.dit_step": dit_step.main,
        "bench.gpu.embedded": embedded.main,
        "bench.gpu.qat_step": qat_step.main,
    }
    for part in SMALLEST:
        main = mains.get(part.command[1])
        if main is not None:
            path = folder / f"{part.name}.json"
            assert not main([*part.command[2:], "--json", str(path)])
            found.append(Result(part.name, "ok", 1.0, json.loads(path.read_text())))
    return found


def test_smallest_parts_measure_what_they_say(results: list[Result]) -> None:
    content = {result.part: result.content or {} for result in results}
    step = content["step-tiny-1"]
    assert set(step["step_ms"]) == {step_on_gpu.BASELINE, step_on_gpu.OURS, step_on_gpu.OURS_INT8} and not step["failed"]
    assert (step["layers"], step["of_layers"], step["tokens"]) == (1, 30, 1560)
    assert step["bytes"]["packed"] < step["bytes"]["bf16"]
    shares = [step[key]["packed"] / step[key]["bf16"] for key in ("bytes", "bytes_of_all_layers")]
    assert shares[1] < shares[0] and step["bytes_of_all_layers"]["bf16"] > step["bytes"]["bf16"]
    assert content["qat-step"]["qat_over_fine_tuning"] > 0
    assert content["embedded"]["difference"] < embedded.AGREEMENT
    assert list(content["embedded"]["stage_seconds"]) == ["load", "calibrate", "train", "pack", "evaluate"]


def test_rows_table_and_targets(results: list[Result]) -> None:
    linear = {
        "rows": [
            {"m": 32760, "k": 5120, "n": 5120, "weight_bits": 4, "activation_bits": 4,
             "ms": {"packed": 1.0, "torch_bf16": 2.0}, "speedup": {"torch_bf16": 2.0}}
        ]
    }  # fmt: skip
    steps = {"packed_linears_compiled": 1.1, "packed": 1.4, "packed_int8_attention": 1.5}
    step = {
        "layers": 3, "of_layers": 40, "frames": 81, "tokens": 32760, "step_ms": dict.fromkeys(steps, 7.0),
        "speedup_over_bf16_compiled": steps, "failed": {"packed_compiled": "RuntimeError: no"},
        "attention_ms": {"FLASH_ATTENTION": 3.0, "int8": 2.0},
        "bytes_of_all_layers": {"bf16": 100, "packed": 28},
    }  # fmt: skip
    all_results = [
        *results, Result("linear", "ok", 3.0, linear), Result("step-wan2.1-14b-81", "ok", 3.0, step),
        Result("tests", "failed with status 1: | 1 failed", 9.0, None),
    ]  # fmt: skip
    found = {target["target"]: target for target in targets(all_results)}
    states = {name: target["state"] for name, target in found.items()}
    assert list(states.values()).count("not measured") == 3  # of Wan 1.3B, and its training: here there is another model's
    assert states["packed linears alone, Wan 14B step"] == "missed"
    assert states["linear layers of Wan 14B over cuBLAS bf16, geometric mean"] == "met"
    assert states["weights in GPU memory, Wan 14B, of bf16"] == "missed"
    assert found["fused, Wan 14B step, best of both attentions"]["value"] == 1.5
    rows = rows_of(all_results)
    assert {row["part"] for row in rows} == {result.part for result in all_results}
    text = markdown(
        {
            "card": "A card",
            "date": "2026-01-01",
            "versions": {"torch": "2", "triton": None},
            "targets": list(found.values()),
            "rows": rows,
        }
    )
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == len(rows) + len(found) + 4
    assert {line.count("|") for line in tables} == {5, 7}
    assert "32760 x 5120 x 5120, W4A4" in text and "RuntimeError: no" in json.dumps(rows)
    assert "| self-attention, int8 | 2.000 |" in text


@pytest.mark.parametrize("name", LINEARS)
@torch.no_grad()
def test_every_variant_of_a_gpu_computes_the_layer(name: str) -> None:
    problem = Problem.random(m=32, k=256, n=64)
    try:
        output = LINEARS[name][0](problem)()().float()
    except Unavailable as reason:
        pytest.skip(f"{name}: {reason}")
    expected = torch.nn.functional.linear(problem.x, problem.weight, problem.bias)
    assert (output - expected).norm() < ROUNDING_W4A4 * expected.norm()


@torch.no_grad()
def test_variants_of_a_step_share_their_weights() -> None:
    models = step_on_gpu.variants("tiny", 1, torch.device("cpu"), compiled=False)
    copied: Any = step_on_gpu._sharing(models["packed"])
    own = {p.data_ptr() for p in models["bf16"].parameters()}
    assert {p.data_ptr() for p in copied.parameters()} < own
    assert copied.blocks[0].attn1.to_q is models["packed"].get_submodule("blocks.0.attn1.to_q")
    assert copied.blocks[0].forward.args[0] is copied.blocks[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu", "--frames", "2"], "4 n + 1"),
        (["--device", "cpu", "--model", "tiny", "--layers", "31"], "1 to 30 layers"),
        (["--device", "abc"], "is no device"),
        (["--device", "meta"], "is not measured"),
        (["--model", "wan2.1-14b"], "--device cuda"),
        pytest.param(["--device", "cuda"], "cannot be used", marks=NO_CARD),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        dit_step.main(arguments)
    assert message in capsys.readouterr().err


def test_published_sizes() -> None:
    """Parameters of the whole models, in billions, as their names say."""
    for name, least, most in (("wan2.1-1.3b", 1.3, 1.5), ("wan2.1-14b", 14, 14.5), ("cogvideox-2b", 1.6, 2)):
        family, config = step_models.MODELS[name]
        with torch.device("meta"):
            count = sum(p.numel() for p in family.transformer(config).parameters())
        assert least <= count / 1e9 <= most


def test_rounds_fit_the_time() -> None:
    assert [rounds_within(60, once) for once in (1e-3, 10, 100)] == [10, 4, 2]


@pytest.mark.parametrize(("name", "in_cache"), [("wan2.1-1.3b", True), ("wan2.1-14b", False)])
def test_the_cost_model_counts_what_is_fused(name: str, in_cache: bool) -> None:
    """Three norms and three sums less: 4 bytes a value each, as residuals are read either way; and 4 a value in the cache."""
    model, m = MODELS[name], 32760
    apart, fused = (packed_step(model, m, 4, CARDS["h100"], fused) for fused in (False, True))
    saved = 24 * m * model.width + (4 * m * model.feed_forward if in_cache else 0)
    assert sum(op.calls * op.bytes for op in apart) - sum(op.calls * op.bytes for op in fused) == model.layers * saved
    assert sum(op.calls * op.operations for op in apart) == sum(op.calls * op.operations for op in fused)
    in_int8 = packed_step(model, m, 4, CARDS["h100"], int8_attention=True)
    text = TEXT_TOKENS["wan"]
    more = (2 * (m + m) + 4 * (m + text)) * model.width  # codes of q written and read, of k too, which is read twice more
    assert sum(op.calls * op.bytes for op in in_int8) - sum(op.calls * op.bytes for op in fused) == model.layers * more
    self_attention = [op for ops in (fused, in_int8) for op in ops if op.name.startswith("self-attention")]
    before, after = (milliseconds(op, CARDS["h100"])[0] for op in self_attention)
    assert after / before == pytest.approx(0.75, rel=1e-3)  # products of codes take half as long
