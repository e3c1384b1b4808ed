"""`qvgen status` in real DVC projects: each reason for which a stage would run appears, in plain words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.commands.status import read_status
from tests.support import toy_project
from tests.support.toy_project import run

pytestmark = [pytest.mark.integration, pytest.mark.slow]

PIPELINE = """
stages:
  first: {cmd: "cat source > one", deps: [source], params: [seed, scheme], outs: [one]}
  second: {cmd: "cat one > two", deps: [one], outs: [two]}
  frozen: {cmd: "cat one > three", deps: [one], outs: [three]}
  always: {cmd: "cat source > four", deps: [source], outs: [four], always_changed: true}
  callback: {cmd: "true"}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A project whose stages are one `cat` each, run once."""
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    (tmp_path / "params.yaml").write_text("seed: 0\nscheme: {num_bits: 4}\n")
    (tmp_path / "source").write_text("x")
    for command in (["git", "init", "-q"], *([sys.executable, "-m", "dvc", *c] for c in (["init", "-q"], ["repro", "-q"]))):
        subprocess.run(command, cwd=tmp_path, check=True)
    return tmp_path


def reasons(project: Path, stage: str) -> tuple[str, ...]:
    return {status.stage: status.reasons for status in read_status(project)}[stage]


def test_only_what_runs_every_time_would_run_again(small: Path) -> None:
    assert {s.stage for s in read_status(small) if s.runs} == {"always", "callback"}
    assert reasons(small, "always") == reasons(small, "callback") == ("runs every time",)


def test_parameters_are_told_with_both_values(small: Path) -> None:
    (small / "params.yaml").write_text("seed: 5\nscheme: {num_bits: 3}\n")
    assert set(reasons(small, "first")) == {"seed: 0 -> 5", "scheme.num_bits: 4 -> 3"}
    (small / "params.yaml").write_text("scheme: {num_bits: 4}\n")
    assert reasons(small, "first") == ("seed is missing in params.yaml",)


def test_command_dependency_and_output(small: Path) -> None:
    (small / "dvc.yaml").write_text(PIPELINE.replace("cat source > one", "cat  source > one"))
    assert reasons(small, "first") == ("the command changed",)
    (small / "source").write_text("y")
    assert reasons(small, "first") == ("source changed", "the command changed")
    assert reasons(small, "always") == ("runs every time", "source changed")
    (small / "source").unlink()
    (small / "one").unlink()
    assert {"source is missing", "output one is missing"} < set(reasons(small, "first"))


def test_upstream_spreads_but_not_into_a_frozen_stage(small: Path) -> None:
    (small / "dvc.yaml").write_text(PIPELINE.replace("outs: [three]}", "outs: [three], frozen: true}"))
    (small / "source").write_text("y")
    found = {status.stage: status for status in read_status(small)}
    assert found["second"].upstream == ("first",) and found["second"].runs
    assert found["frozen"].upstream == ()


def test_the_command_line_counts_and_speaks_json(small: Path) -> None:
    code, output = run(small, "pipelines.cli", "status", "second")
    assert (code, output.splitlines()[-1].partition(";")[0]) == (0, "0 of 2 stages would run")
    (small / "source").write_text("y")
    code, output = run(small, "pipelines.cli", "status", "second", "--json")
    assert code == 0
    assert json.loads(output) == [
        {"stage": "first", "reasons": ["source changed"], "upstream": [], "runs": True},
        {"stage": "second", "reasons": [], "upstream": ["first"], "runs": True},
    ]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return toy_project.make(tmp_path)


def test_status_says_why(project: Path) -> None:
    assert {s.stage: s.reasons[0] for s in read_status(project)} == dict.fromkeys("abcd", "never ran")
    code, output = run(project, "dvc", "repro")
    assert code == 0, output
    assert not any(status.runs for status in read_status(project))

    (project / "stages" / "b.py").write_text((project / "stages" / "b.py").read_text() + "# more\n")
    (project / "artifacts" / "c" / "value").write_text("spoilt")
    by_name = {status.stage: status for status in read_status(project)}
    assert not by_name["a"].runs
    assert by_name["b"].reasons == ("stages/b.py changed",)
    assert by_name["c"].reasons == ("output artifacts/c changed",)
    assert by_name["d"].upstream == ("b", "c")

    params = yaml.safe_load((project / "params.yaml").read_text())
    (project / "params.yaml").write_text(yaml.safe_dump(params | {"seed": 7}, sort_keys=False))
    assert "seed: 0 -> 7" in {status.stage: status for status in read_status(project, ["a"])}["a"].reasons
    with pytest.raises(ValueError, match="has a stage 'nosuch'"):
        read_status(project, ["nosuch"])


def test_changed_code_is_told_before_stage_observe_has_run_again(tmp_path: Path) -> None:
    """And for the stages that reach it alone; reading writes nothing."""
    project = tmp_path / "project"
    for folder in ("stages", "qvgen"):
        (project / folder).mkdir(parents=True)
        (project / folder / "__init__.py").touch()
    for part in ("observe.py", "runtime", "dvc.yaml"):
        (project / "stages" / part).symlink_to(toy_project.ROOT / "stages" / part)
    for part in ("lazy.py", "models", "safe_yaml.py"):  # which observe reads the folders of params.yaml with
        (project / "qvgen" / part).symlink_to(toy_project.ROOT / "qvgen" / part)
    for name in "ab":
        (project / f"qvgen/{name}.py").write_text("VALUE = 1\n")
        (project / f"stages/{name}.py").write_text(f"from qvgen.{name} import VALUE\n")
    stage = "{{cmd: echo > {0}, outs: [{0}], params: [artifacts/code.json: [code.{0}]]}}"
    (project / "dvc.yaml").write_text("stages:\n" + "".join(f"  {name}: {stage.format(name)}\n" for name in "ab"))
    for command in (["git", "init", "-q"], *([sys.executable, "-m", "dvc", *c] for c in (["init", "-q"], ["repro", "-q"]))):
        subprocess.run(command, cwd=project, check=True)
    assert reasons(project, "a") == reasons(project, "b") == ()
    (project / "qvgen/a.py").write_text("# a remark\nVALUE = 1\n")
    assert reasons(project, "a") == ()
    (project / "qvgen/a.py").write_text("VALUE = 2\n")
    assert reasons(project, "a") == ("its code changed",) and reasons(project, "b") == ()
    code, output = run(project, "dvc", "repro")
    assert code == 0 and "Stage 'b' didn't change" in output and "Running stage 'a'" in output, output
    assert reasons(project, "a") == ()
