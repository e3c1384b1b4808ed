"""dvc.yaml, stages/ and params.yaml tell one story."""

import json
import shutil
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grimp
import pytest
import yaml
from dvc.repo import Repo

from comparison import code as compare_code
from qvgen.methods.registry import METHODS
from qvgen.params import Params, load_params
from stages.runtime.source import is_code

ROOT = Path(__file__).parents[2]
STAGES = sorted(path.stem for path in (ROOT / "stages").glob("[!_]*.py"))
PIPELINE = [name for name in STAGES if name != "observe"]
# Of the comparison: declarations, and what only reports.
UNTRACKED_MODULES = {"qvgen", "qvgen.params"}
REPORTING = {"stages", "stages.runtime", "stages.runtime.dvc", "stages.record"} | {
    f"stages.record.{path.stem}" for path in (ROOT / "stages/record").glob("[!_]*.py")
}
# What starts and ends a run changes no number, and a case of the comparison takes minutes: a hundred would run again.
RUNNING = {"stages.runtime.run", "stages.runtime.outputs"}
# Run as a process of its own, so imports do not show it.
STARTED = {"qvgen/evaluation/cost/memory.py"}
CODE = "comparison/code.json"  # what stage compare_code makes of its dependencies
# Asked for the names of the methods only.
NAMES = {"qvgen.methods.registry"}
# Sections of params.yaml that no stage reads: how stages are run, and what happens after them.
WITHOUT_STAGE = {"gate", "flow"}
WITHOUT_SECTION = {
    "baselines": "does for rtn and mse what calibrate, pack and evaluate do, with their knobs",
    "observe": "describes the machine and the code, nothing to choose",
}


@cache
def dvc_yaml() -> dict[str, Any]:
    """Stages of the pipeline; the one that runs every time has a file of its own."""
    files = (ROOT / "dvc.yaml", ROOT / "stages/dvc.yaml")
    return {k: v for file in files for k, v in yaml.safe_load(file.read_text(encoding="utf-8"))["stages"].items()}


@cache
def comparison() -> dict[str, Any]:
    """Stages of comparison/dvc.yaml as they are for the first item of their matrix."""
    stages = yaml.safe_load((ROOT / "comparison/dvc.yaml").read_text(encoding="utf-8"))["stages"]
    for stage in stages.values():
        text = yaml.safe_dump(stage)
        for key, values in stage.get("matrix", {}).items():
            text = text.replace(f"${{item.{key}}}", str(values[0]))
        stage.update(yaml.safe_load(text))
    return stages


@cache
def imports() -> grimp.ImportGraph:
    return grimp.build_graph("qvgen", "stages", "comparison")


def path_of(module: str) -> str:
    base = module.replace(".", "/")
    return f"{base}/__init__.py" if (ROOT / base).is_dir() else f"{base}.py"


def scripts(name: str) -> set[str]:
    """A stage's module and those of stages/ and comparison/ that it shares with others."""
    found, todo = set(), {name}
    while todo:
        module = todo.pop()
        found.add(module)
        imported = imports().find_modules_directly_imported_by(module)
        todo |= {m for m in imported if m.startswith(("stages.", "comparison."))} - REPORTING - found
    return found


def library(modules: set[str]) -> set[str]:
    return {m for m in modules if m.split(".")[0] == "qvgen"} - UNTRACKED_MODULES


def covers(dep: str, module: str) -> bool:
    path = path_of(module)
    return path == dep or path.startswith(f"{dep}/")


def top_level_params(stage: dict[str, Any]) -> set[str]:
    return {key.split(".")[0] for key in stage.get("params", []) if isinstance(key, str)}


def test_dvc_reads_the_graph() -> None:
    with Repo(str(ROOT)) as repo:
        names = {stage.name for stage in repo.index.stages if Path(stage.path).parent in (ROOT, ROOT / "stages")}
        assert repo.index.graph.number_of_edges() > 0  # raises if stages form a circle or share an output
    assert names == set(STAGES)


def test_params_yaml_states_every_knob() -> None:
    """A default that only the code knows is a knob that nobody finds."""
    load_params(ROOT / "params.yaml")
    stated = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    fields = {info.alias or name: info.annotation for name, info in Params.model_fields.items()}
    assert set(stated) == set(fields)
    for name, section in fields.items():
        if name != "scheme" and hasattr(section, "model_fields"):
            assert set(stated[name]) == set(section.model_fields), name


def test_every_parameter_belongs_to_a_stage() -> None:
    used = set().union(*(top_level_params(stage) for stage in dvc_yaml().values()))
    assert used | WITHOUT_STAGE == set(yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")))
    assert not used & WITHOUT_STAGE


def test_nothing_is_interpolated() -> None:
    """A value inside `cmd` changes the command in dvc.lock: stages read params.yaml themselves."""
    assert "${" not in (ROOT / "dvc.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", STAGES)
def test_stage_names_its_script_and_its_section(name: str) -> None:
    stage = dvc_yaml()[name]
    assert f"stages.{name}" in stage["cmd"] or f"stages/{name}.py" in stage["cmd"]
    assert (name in top_level_params(stage)) != (name in WITHOUT_SECTION)


def test_every_stage_depends_on_its_own_code_and_lists_no_file_of_it() -> None:
    for name in PIPELINE:
        stage = dvc_yaml()[name]
        assert {"artifacts/code.json": [f"code.{name}"]} in stage["params"], name
        assert [dep for dep in stage["deps"] if is_code(dep)] == [], name


@pytest.mark.parametrize("name", sorted(comparison().keys() - {"compare_code"}))
def test_comparison_depends_on_the_code_that_it_uses_and_no_more(name: str) -> None:
    stage = comparison()[name]
    script = stage["cmd"].split()[2]
    check_dependencies(stage, script, RUNNING | (NAMES if script != "comparison.case" else set()))


def test_the_code_of_a_case_is_what_a_case_depends_on() -> None:
    code = comparison()["compare_code"]
    assert code["metrics"] == [{CODE: {"cache": False}}]
    check_dependencies({"deps": [dep for dep in code["deps"] if dep != "comparison/code.py"]}, "comparison.case", RUNNING)
    cases = {name: stage for name, stage in comparison().items() if stage["cmd"].startswith("python -m comparison.case ")}
    assert len(cases) >= 6
    for name, stage in cases.items():
        method = stage["cmd"].split("--method ")[1].split()[0]
        assert {CODE: ["shared", f"methods.{method}"]} in stage["params"], name


def test_a_case_depends_on_its_own_method_only(tmp_path: Path) -> None:
    """An edit to one method changes its entry of comparison/code.json and no other."""
    before, after = (code_after(tmp_path / str(i), edited) for i, edited in enumerate(("", "qvgen_plus.py")))
    assert before["shared"] == after["shared"] and before["methods"].keys() == METHODS.keys()
    assert {name for name in METHODS if before["methods"][name] != after["methods"][name]} == {"qvgen+"}
    assert code_after(tmp_path / "2", "method.py")["shared"] != before["shared"]


def code_after(root: Path, edited: str) -> dict[str, Any]:
    """comparison/code.json of a copy of the methods, one of them edited."""
    shutil.copytree(ROOT / "qvgen/methods", root / "qvgen/methods", ignore=shutil.ignore_patterns("__pycache__"))
    if edited:
        with (root / "qvgen/methods" / edited).open("a") as file:
            file.write("# edited\n")
    facts = SimpleNamespace(deps={"qvgen/quant": "1", "qvgen/methods": edited, "comparison/code.py": edited})
    written = root / "code.json"
    compare_code.run(SimpleNamespace(root=root, facts=facts, outputs=lambda path: nullcontext(written)))  # type: ignore[arg-type]
    return json.loads(written.read_text())


def check_dependencies(stage: dict[str, Any], script: str, untracked: set[str]) -> None:
    deps = [dep for dep in stage["deps"] if isinstance(dep, str)]
    if any(CODE in params for params in stage.get("params", []) if isinstance(params, dict)):
        deps += comparison()["compare_code"]["deps"]
    own = scripts(script) - untracked
    direct = set().union(*(imports().find_modules_directly_imported_by(module) for module in own))
    needed = own | (library(direct) - untracked)
    assert [m for m in sorted(needed) if not any(covers(dep, m) for dep in deps)] == []

    used = imports().find_upstream_modules(script)
    unused = [dep for dep in deps if dep.startswith("qvgen/") and not any(covers(dep, m) for m in used)]
    assert set(unused) <= STARTED
    assert [dep for dep in deps if dep.startswith(("qvgen/", "stages/")) and not (ROOT / dep).exists()] == []


def test_the_docs_draw_the_graph_that_dvc_runs() -> None:
    with Repo(str(ROOT)) as repo:
        ours = {s for s in repo.index.stages if s.path_in_repo in ("dvc.yaml", "stages/dvc.yaml")}
        graph = repo.index.graph.subgraph(ours)
        edges = {(upstream.name, stage.name) for stage, upstream in graph.edges}
    # Every stage depends on its code, which observe describes; what is drawn is that one depends on the machine.
    edges -= {("observe", name) for name in PIPELINE if "artifacts/hardware.json" not in dvc_yaml()[name]["deps"]}
    diagram = (ROOT / "docs/pipeline.md").read_text(encoding="utf-8").split("```mermaid")[1].split("```")[0]
    drawn = {tuple(line.strip().split("-->")) for line in diagram.splitlines() if "-->" in line}
    assert drawn == edges
