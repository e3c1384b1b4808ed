"""The fingerprint of a stage's code: what changes it, what does not, and that nothing is left out."""

import ast
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import grimp
import pytest

from qvgen.params import Params
from stages import observe
from stages.runtime.code import EXCLUDED, NOT_RUN, code_fingerprints, reachable
from stages.runtime.source import PARAMS, module_of, summarize

ROOT = Path(__file__).parents[2]
STAGES = sorted(path.stem for path in (ROOT / "stages").glob("[!_]*.py") if path.stem != "observe")
SOURCES = observe.Sources(ROOT)
TRAINING = ("calibrate", "qat", "decay")


@cache
def before() -> dict[str, str]:
    return code_fingerprints(SOURCES.read, SOURCES.paths, STAGES)


@cache
def files(stage: str) -> set[str]:
    return reachable(SOURCES.read, SOURCES.paths, stage)


def changed(path: str, edit: Callable[[str], str], renamed: str | None = None) -> set[str]:
    """Stages whose fingerprint an edit to one file changes, or to the file and its name."""
    text = (ROOT / path).read_text(encoding="utf-8")
    new = edit(text)
    assert new != text or renamed, f"{path} has no such text any more: adapt this test"
    paths = [(renamed or path) if known == path else known for known in SOURCES.paths]
    content = {renamed or path: new}
    if renamed:
        old, moved = module_of(path), module_of(renamed)
        for known in SOURCES.paths:
            if known != path and known.endswith(".py"):
                content[known] = (ROOT / known).read_text(encoding="utf-8").replace(old, moved)

    def read(known: str):
        return summarize(known, content[known].encode()) if known in content else SOURCES.read(known)

    after = code_fingerprints(read, paths, STAGES)
    return {stage for stage in STAGES if before()[stage] != after[stage]}


def users(path: str) -> set[str]:
    return {stage for stage in STAGES if path in files(stage)}


@cache
def imports() -> grimp.ImportGraph:
    return grimp.build_graph("qvgen", "stages", exclude_type_checking_imports=True)


def excluded(module: str, stage: str) -> bool:
    names = [*EXCLUDED, *(name for name, (stages, _) in NOT_RUN.items() if stage in stages)]
    return any(module == name or (name.endswith(".") and f"{module}.".startswith(name)) for name in names)


@pytest.mark.parametrize("stage", STAGES)
def test_every_import_of_a_reachable_module_is_reachable(stage: str) -> None:
    """By another reader of imports than ours."""
    modules = {module_of(path) for path in files(stage) if path.endswith(".py")}
    assert f"stages.{stage}" in modules
    for module in sorted(modules):
        for found in imports().find_modules_directly_imported_by(module):
            package = (ROOT / found.replace(".", "/")).is_dir()  # what it only hands on comes from elsewhere
            assert package or found in modules or found == PARAMS or excluded(found, stage), f"{module} imports {found}"


def test_what_imports_do_not_show_is_reachable() -> None:
    assert "qvgen/evaluation/cost/memory.py" in files("benchmark")  # a process of its own
    assert "qvgen/kernels/cpu/csrc/linear/linear.cpp" in files("evaluate") and "CMakeLists.txt" in files("evaluate")
    for path in (ROOT / "qvgen/methods").glob("[!_]*.py"):  # params.yaml names one
        assert all(path.relative_to(ROOT).as_posix() in files(stage) for stage in TRAINING), path


def test_what_params_compute_is_asked_for_by_name() -> None:
    path = "qvgen/params.py"
    assert {"chosen", "effective_scheme", "schedule"} <= set(SOURCES.read(path).computes) & vars(Params).keys()
    assert users(path) >= {*TRAINING, "pack"} and not users(path) & {"fetch", "prepare", "evaluate", "register"}
    assert changed(path, lambda text: text.replace("METHODS[self.method]\n", "METHODS[str(self.method)]\n")) == users(path)
    section = "class Further(_Section):\n    x: int = 1\n\n\nclass Register("
    assert changed(path, lambda text: text.replace("class Register(", section)) == set(), "a new section retrains nothing"
    gate = "qvgen/gate.py"
    assert changed(gate, lambda text: text.replace("either max or min", "max or min")) == set(), "nor does a rule of the gate"


def test_training_packs_nothing() -> None:
    """The reason in NOT_RUN."""
    for stage in TRAINING:
        texts = {path: (ROOT / path).read_text() for path in files(stage) if path.endswith(".py")}
        calls = [path for path, text in texts.items() if re.search(r"(?<!def )convert_\(", text)]
        assert calls == [], stage
    assert all(set(stages) <= set(STAGES) and reason for stages, reason in NOT_RUN.values())


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("qvgen/nn/swap.py", '"""', '"""Reworded. '),
        ("qvgen/nn/swap.py", "\nimport torch\n", "\n# a remark\nimport torch\n"),
        ("qvgen/nn/swap.py", "import torch\nfrom torch import nn\n", "from torch import nn\nimport torch\n"),
        ("qvgen/nn/swap.py", "def convert_(model: nn.Module) -> list[str]:", "def convert_(\n    model,\n):"),
        ("qvgen/nn/swap.py", "from qvgen.nn.targets import", "from .targets import"),
        ("qvgen/kernels/cpu/csrc/linear/linear.cpp", "#include", "// a remark\n\n/* another */\n#include"),
        ("CMakeLists.txt", "# ", "## "),
    ],
)
def test_what_changes_no_result_changes_no_fingerprint(path: str, old: str, new: str) -> None:
    assert changed(path, lambda text: text.replace(old, new, 1)) == set()


def test_a_moved_file_changes_no_fingerprint() -> None:
    assert changed("qvgen/nn/targets.py", lambda text: text, renamed="qvgen/quant/choice.py") == set()
    assert changed("qvgen/evaluation/cost/memory.py", lambda text: text, renamed="qvgen/sampling/peak.py") == set()


@pytest.mark.parametrize(
    "path",
    [
        "qvgen/nn/adapter.py",
        "qvgen/nn/timestep.py",
        "qvgen/quant/scheme.py",
        "qvgen/data/latents.py",
        "stages/runtime/outputs.py",
    ],
)
def test_a_changed_expression_changes_the_stages_that_reach_it_and_no_other(path: str) -> None:
    assert len(users(path)) > 0
    assert changed(path, lambda text: text + "\nFURTHER = 1\n") == users(path)


def test_a_kernel_changes_the_stages_that_run_packed_layers() -> None:
    path = "qvgen/kernels/cpu/csrc/linear/grid.cpp"
    assert (
        changed(path, lambda text: text + "\nint further;\n") == users(path) == {"baselines", "pack", "evaluate", "benchmark"}
    )


def test_another_target_of_an_import_counts_though_no_name_changes(tmp_path: Path) -> None:
    """Both modules are reachable before and after."""
    for folder in ("stages", "qvgen"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "qvgen/a.py").write_text("def f(): return 1\n")
    (tmp_path / "qvgen/b.py").write_text("def f(): return 2\n")
    script = tmp_path / "stages/s.py"
    script.write_text("import qvgen.a as a\nimport qvgen.b as b\nfrom qvgen.a import f\n")
    first = observe.code(tmp_path)
    script.write_text(script.read_text().replace("from qvgen.a", "from qvgen.b"))
    second = observe.code(tmp_path)
    assert first["s"] != second["s"]
    (tmp_path / "qvgen/__init__.py").write_text('"""A face."""\nfrom qvgen.b import f\n__all__ = ["f"]\n')
    script.write_text(script.read_text().replace("from qvgen.b", "from qvgen"))
    assert observe.code(tmp_path) == second, "a name that a package hands on is that of its module"


@pytest.mark.parametrize("path", ["stages/record/journal.py", "stages/record/sender.py", "stages/runtime/dvc.py"])
def test_modules_that_only_report_change_none(path: str) -> None:
    assert changed(path, lambda text: text + "\nFURTHER = 1\n") == set()


def test_each_exclusion_is_there_and_has_a_reason() -> None:
    modules = {module_of(path) for path in SOURCES.paths if path.endswith(".py")}
    for name, reason in EXCLUDED.items():
        assert reason and any(module == name or module.startswith(name) for module in modules), name


def test_what_was_read_is_kept_until_a_file_changes(tmp_path: Path) -> None:
    for folder in ("stages", "qvgen"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    observe.write(tmp_path)
    seen = (tmp_path / observe.SEEN).read_bytes()
    first = observe.code(tmp_path)
    file = tmp_path / "qvgen/nn/adapter.py"
    file.write_text(file.read_text() + "FURTHER = 1\n")
    assert {stage for stage in first if observe.code(tmp_path)[stage] != first[stage]} == users("qvgen/nn/adapter.py")
    assert (tmp_path / observe.SEEN).read_bytes() == seen, "reading writes nothing"
    (tmp_path / observe.SEEN).write_text("{")
    observe.write(tmp_path)
    assert observe.code(tmp_path) != first


def test_a_fault_of_the_parser_beside_other_threads_is_no_fault_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython issue 106905, met once in CI: a SystemError that the same file does not give a moment later."""
    parse, calls = ast.parse, []

    def fails_first(content: bytes) -> ast.Module:
        calls.append(content)
        if len(calls) == 1:
            raise SystemError("AST constructor recursion depth mismatch (before=120, after=69)")
        return parse(content)

    expected = summarize("qvgen/a.py", b"import torch")
    monkeypatch.setattr(ast, "parse", fails_first)
    assert summarize("qvgen/a.py", b"import torch") == expected and len(calls) == 2
