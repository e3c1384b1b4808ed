"""dvc.yaml, stages/ and params.yaml tell one story."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo

from qvgen.params import Params, load_params
from stages.runtime.source import is_code

ROOT = Path(__file__).parents[2]
STAGES = sorted(path.stem for path in (ROOT / "stages").glob("[!_]*.py"))
PIPELINE = [name for name in STAGES if name != "observe"]
# Sections of params.yaml that no stage reads: how stages are run, and what happens after them.
WITHOUT_STAGE = {"gate", "flow", "compute"}
WITHOUT_SECTION = {
    "baselines": "does for rtn and mse what calibrate, pack and evaluate do, with their knobs",
    "observe": "describes the machine and the code, nothing to choose",
}


@cache
def dvc_yaml() -> dict[str, Any]:
    """Stages of the pipeline; the one that runs every time has a file of its own."""
    files = (ROOT / "dvc.yaml", ROOT / "stages/dvc.yaml")
    return {k: v for file in files for k, v in yaml.safe_load(file.read_text(encoding="utf-8"))["stages"].items()}


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


def test_results_of_the_comparison_do_not_depend_on_code() -> None:
    """A tidied file must not make a hundred cases stale: only fingerprints, parameters and data do."""
    stages = yaml.safe_load((ROOT / "comparison/dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert stages.keys() == {"compare", "report"}
    assert not [dep for dep in stages["compare"]["deps"] if Path(dep).suffix == ".py" or (ROOT / dep / "__init__.py").exists()]
    assert len((ROOT / "comparison/dvc.lock").read_text(encoding="utf-8").splitlines()) < 100


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
