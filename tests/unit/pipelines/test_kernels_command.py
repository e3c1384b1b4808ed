"""`qvgen kernels`: the table and the JSON say what the registry and the block ops will do."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli.everyday import app
from pipelines.commands.kernels import isa_line, measured_line, report
from qvgen.kernels.block_ops import OPS
from qvgen.kernels.cpu import library
from qvgen.kernels.registry import OP, backends


@pytest.fixture(autouse=True)
def _no_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QVGEN_KERNELS", raising=False)


def kernels(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["kernels", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def chosen(rows: list[dict[str, object]]) -> dict[object, object]:
    return {row["op"]: row["backend"] for row in rows if row["chosen"]}


def test_json_has_a_row_per_op_and_backend_and_one_choice_per_op() -> None:
    rows = json.loads(kernels("--json"))["kernels"]
    assert [row["backend"] for row in rows if row["op"] == OP] == [b.name for b in backends()]
    compiled = {"attention": ["cpu"], "attention_int8": ["triton"]}  # PyTorch's attention is used on GPUs
    for op in OPS:
        found = [row["backend"] for row in rows if row["op"] == op]
        assert found == [*compiled.get(op, ["triton", "cpu"]), "reference"]
    assert list(chosen(rows)) == [OP, *OPS]
    assert all(set(row) == {"op", "backend", "available", "reason", "chosen"} for row in rows)
    assert all(row["reason"] for row in rows if not row["available"])


def test_the_table_shows_what_the_json_says() -> None:
    text, content = kernels(), json.loads(kernels("--json"))
    lines = [line for line in text.splitlines() if line.startswith("│")]
    for row in content["kernels"]:
        cells = [row["op"], row["backend"], "yes" if row["available"] else "no", "yes" if row["chosen"] else "no"]
        assert any([cell.strip() for cell in line.split("│")[1:5]] == cells for line in lines), cells
    assert isa_line(content["isa"]) in text
    assert "QVGEN_KERNELS=auto" in text


def test_measuring_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if report()["measured"] is None:
        pytest.skip("the compiled kernels are not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        measured = json.loads(kernels("--measure", "--json"))["measured"]
    finally:
        library.isa.cache_clear()
    (file,) = tmp_path.rglob("*.json")
    assert measured["path"] == str(file)
    assert json.loads(file.read_text())["linear_ms"] == measured["linear_ms"]
    line = measured_line(measured)
    assert f"{measured['isa']} {measured['linear_ms'][measured['isa']]:.2f} ms" in line
    assert line.endswith(f"kept in {file}")
    assert measured_line(measured | {"path": ""}).endswith("not kept: the cache folder cannot be written to")


def test_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVGEN_KERNELS", "reference")
    content = json.loads(kernels("--json"))
    assert content["preference"] == "reference"
    assert chosen(content["kernels"]) == dict.fromkeys([OP, *OPS], "reference")


def test_an_unknown_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVGEN_KERNELS", "fastest")
    result = CliRunner().invoke(app, ["kernels"])
    assert result.exit_code == 2
    assert "QVGEN_KERNELS='fastest' is not one of auto, reference, cpu" in result.output


def test_without_the_library_every_row_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QVGEN_CPU_LIBRARY", str(tmp_path / "none.so"))
    library.load.cache_clear()
    library.isa.cache_clear()
    try:
        content = report()
    finally:
        monkeypatch.undo()
        library.load.cache_clear()
        library.isa.cache_clear()
    assert content["isa"] == {"used": None, "supported": [], "lacking": [], "refusals": {}}
    assert content["measured"] is None
    rows = [row for row in content["kernels"] if row["backend"] == "cpu"]
    assert [row["op"] for row in rows] == [OP, *(op for op in OPS if op != "attention_int8")]
    assert all(not row["available"] and "none.so" in row["reason"] for row in rows)
    assert chosen(content["kernels"]) == dict.fromkeys([OP, *OPS], "reference")


def test_instruction_sets_in_a_line() -> None:
    sets = {"used": "b", "supported": ["b", "c"], "lacking": ["a", "d"], "refusals": {"d": "why"}}
    assert isa_line(sets) == "Instruction set in use: b; also here: c; not in this machine: a, d (why)"
    assert isa_line({"used": None, "supported": [], "lacking": []}) == "Instruction set in use: none"
