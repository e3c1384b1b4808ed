"""`qvgen promote` and `qvgen audit` on a real project of git, DVC and MLflow; each way to spoil a record is caught by name."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.audit.blobs import open_blobs
from pipelines.audit.project import current_hash
from pipelines.audit.report import audit, find_uses
from pipelines.champion.kept import check_gc
from pipelines.champion.promote import promote, promote_after_run
from qvgen.hub.promotions import Promotion, alias_version, promotions
from qvgen.params import load_params
from stages.record.connection import connect
from tests.support import audited_project as toy
from tests.support.audited_project import copy, failed

pytestmark = [pytest.mark.integration, pytest.mark.slow]

DOCS = toy.ROOT / "docs/audit.md"


@pytest.fixture(scope="module", autouse=True)
def _embedded_tracking() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


@pytest.fixture(scope="module")
def audited(champion: Path) -> Path:
    """Tests copy it before they change it."""
    return champion


@pytest.fixture
def project(audited: Path, tmp_path: Path) -> Path:
    return copy(audited, tmp_path / "project")


@pytest.fixture(scope="module")
def worse(audited: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after a second run whose videos are worse, from a tree with an uncommitted change."""
    root = copy(audited, tmp_path_factory.mktemp("worse") / "project")
    toy.set_psnr(root, 20.0)
    code, output = toy.run(root, "dvc", "repro")
    assert code == 0, output
    assert (
        "qvgen version 2 fails 2 of 13 rules (psnr_db, psnr_db against champion): version 1 stays champion"
        in promote_after_run(root)
    )
    return root


def test_a_good_model_passes_every_check(audited: Path) -> None:
    report = audit(audited, "qvgen@champion")
    assert report.ok, str(report)
    table = re.findall(r"^\| ([a-z0-9., ]+) \| (?!what)", DOCS.read_text(), re.MULTILINE)
    assert {check.name for check in report.checks} == set(", ".join(table).split(", ")), "the guide explains each check"
    start, results = toy.git(audited, "log", "--reverse", "--format=%H").split()
    (lock,) = (check.detail for check in report.checks if check.name == "dvc.lock")
    assert lock == f"{results[:12]} (a later commit than the run's, {start[:12]}) has every hash"
    assert f"git checkout --quiet {start}" in report.rebuild
    (runs,) = (check.detail for check in report.checks if check.name == "runs")
    assert set(runs.removeprefix("4: ").split(" <- ")) == set(toy.STAGES)
    assert "dvc checkout assets/raw.txt" in report.rebuild
    (data,) = (check.detail for check in report.checks if check.name == "data")
    assert data.startswith("artifacts/data, assets/raw.txt: 4 files are in the cache")
    assert audit(audited, "qvgen/1").ok and audit(audited, "qvgen@challenger").ok


@pytest.mark.parametrize("reference", ["qvgen", "other@champion", "qvgen/7"])
def test_what_is_not_in_the_registry_is_refused(audited: Path, reference: str) -> None:
    with pytest.raises(ValueError, match=r"qvgen|other"):
        audit(audited, reference)


def test_an_alias_that_nobody_set(audited: Path) -> None:
    assert "has no alias staging" in failed(audited, "qvgen@staging")["alias"]


def test_tampered_weights(project: Path) -> None:
    _spoil(project, "transformer/weights.safetensors")
    faults = failed(project)
    assert faults.keys() == {"packed model", "sha256"}
    assert "is damaged" in faults["packed model"]


def test_tampered_and_missing_data(project: Path) -> None:
    _spoil(project, "1.txt", "artifacts/data")
    assert failed(project).keys() == {"data"}
    for blob in (project / ".dvc/cache/files/md5").rglob("*.dir"):
        blob.chmod(0o644)
        blob.write_text("[")
    assert "it is no list of files" in failed(project)["packed model"]
    with open_blobs(project) as blobs:
        assert not blobs.in_cache(current_hash(project, "artifacts/packed"))
    for blob in (project / ".dvc/cache/files/md5").rglob("*.dir"):
        blob.unlink()
    assert failed(project).keys() == {"data", "packed model", "sha256", "workspace"}


def _spoil(project: Path, name: str, out: str = "artifacts/packed") -> None:
    with open_blobs(project) as blobs:
        path = Path(blobs.cache.oid_to_path(blobs.files(current_hash(project, out))[name]))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"!")


@pytest.mark.parametrize("stage", ["register", "prepare"])
def test_a_deleted_run(project: Path, stage: str) -> None:
    client, experiment = connect(project)
    (run,) = client.search_runs([experiment], f"tags.`dvc.stage` = '{stage}'")
    client.delete_run(run.info.run_id)
    assert failed(project)["runs"].startswith(f"{stage} (run {run.info.run_id}) is deleted")


def test_a_deleted_parent_and_logged_model(project: Path) -> None:
    client, experiment = connect(project)
    (run,) = client.search_runs([experiment], "tags.`dvc.stage` = 'register'")
    client.delete_run(run.data.tags["mlflow.parentRunId"])
    assert "is deleted" in failed(project)["parent runs"]
    (model,) = client.search_logged_models([experiment])
    client.delete_logged_model(model.model_id)
    assert "is deleted" in failed(project)["logged model"]


def test_an_alias_moved_by_hand(worse: Path, tmp_path: Path) -> None:
    project = copy(worse, tmp_path / "project")
    client, _ = connect(project)
    client.set_registered_model_alias("qvgen", "champion", "2")
    assert "champion is version 2, the newest record (number 1) says 1" in failed(project)["alias"]
    params = load_params(project / "params.yaml")
    assert not promote(project, params).ok, "an alias moved by hand does not lower the bar"
    repaired = promote(project, params, version=1)
    assert repaired.ok and repaired.moved and "alias" not in failed(project)
    assert len(promotions(client, "qvgen", "champion")) == 1


def test_a_changed_tag_of_the_version(project: Path) -> None:
    client, _ = connect(project)
    client.set_model_version_tag("qvgen", "1", "dvc.md5", "0" * 32)
    assert {"logged model", "packed model", "dvc.lock"} <= failed(project).keys()


def test_a_changed_lock(project: Path) -> None:
    lock = project / "dvc.lock"
    md5 = re.findall(r"[0-9a-f]{32}\.dir", lock.read_text())[0]
    lock.write_text(lock.read_text().replace(md5, "0" * 32 + ".dir"))
    assert failed(project) == {}, "what is not committed is no evidence, and not held against the model"
    toy.git(project, "commit", "-qam", "results", "--amend")
    faults = failed(project)
    assert faults["dvc.lock"].startswith("dvc.lock with these hashes is not committed: ")
    assert md5 in faults["dvc.lock"]
    assert faults.keys() == {"dvc.lock", "metrics", "seal"}


def test_a_lock_on_another_branch_counts(project: Path) -> None:
    toy.git(project, "branch", "retrain/1")
    toy.git(project, "reset", "-q", "--hard", "HEAD~1")
    assert failed(project) == {}
    toy.git(project, "branch", "-qD", "retrain/1")
    faults = failed(project)
    assert faults.keys() == {"dvc.lock", "metrics", "seal", "promotion"} and "is absent" in faults["dvc.lock"]


def test_what_was_not_committed_yet(project: Path) -> None:
    """As after the first `make repro`: nothing is wrong, and one command is left to do."""
    toy.git(project, "reset", "-q", "HEAD~1")
    report = audit(project, "qvgen@champion")
    states = {check.name: check.state for check in report.checks if check.state != "PASS"}
    assert states == dict.fromkeys(("dvc.lock", "metrics", "seal", "promotion"), "TODO"), str(report)
    assert report.exit_code == 2 and not report.ok
    last = str(report).splitlines()[len(report.checks) + 1]
    assert last.startswith("qvgen version 1: nothing fails, but 4 of 25 checks wait for the results to be committed: `git add")
    code, output = toy.run(project, "bash", "-euc", last.split("`")[1])
    assert code == 0, output
    assert audit(project, "qvgen@champion").exit_code == 0


def test_another_model_in_the_checkout(project: Path) -> None:
    weights = project / "artifacts/packed/transformer/weights.safetensors"
    weights.chmod(0o644)
    content = weights.read_bytes()
    weights.unlink()  # it may be a link into the cache
    weights.write_bytes(content[:-1] + b"!")
    report = audit(project, "qvgen@champion")
    assert report.exit_code == 3 and {check.name for check in report.checks if not check.ok} == {"workspace"}
    code, output = toy.run(project, "qvgen", "audit", "qvgen@champion")
    assert (
        code == 3 and "weights.safetensors is not what was audited" in output and "this checkout has another model" in output
    )


def test_a_commit_that_is_gone(project: Path) -> None:
    shutil.rmtree(project / ".git")
    toy.git(project, "init", "-q")
    toy.git(project, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "--allow-empty", "-m", "new")
    assert {"commit", "dvc.lock"} <= failed(project).keys()


def test_a_dirty_tree(worse: Path) -> None:
    faults = failed(worse, "qvgen@challenger")
    assert {"clean tree", "code"} <= faults.keys()
    assert "began in a tree with uncommitted changes" in faults["clean tree"]
    assert faults["code"].startswith("assets/evaluate.json of measure")


def test_the_gate_keeps_the_champion_and_force_is_recorded(worse: Path, tmp_path: Path, monkeypatch: Any) -> None:
    project = copy(worse, tmp_path / "project")
    monkeypatch.chdir(project)
    from pipelines.cli.everyday import app

    refused = CliRunner().invoke(app, ["promote"])
    assert refused.exit_code == 1
    assert re.search(r"^FAIL +psnr_db +20 >= 27 +packed\.psnr_db$", refused.output, re.MULTILINE)
    assert "version 1 stays champion" in refused.output
    client, _ = connect(project)
    assert alias_version(client, "qvgen", "champion") == 1

    params = load_params(project / "params.yaml")
    with pytest.raises(ValueError, match="--reason"):
        promote(project, params, force=True)
    forced = CliRunner().invoke(app, ["promote", "--force", "--reason", "a demonstration", "--json"])
    assert forced.exit_code == 0
    assert json.loads(forced.output)["moved"]
    first, second = promotions(client, "qvgen", "champion")
    assert (first.version, first.forced, second.version, second.forced) == (1, False, 2, True)
    assert second.reason == "a demonstration" and second.gate is not None
    assert second.gate["psnr_db"] == [20.0, ">= 27", False]
    assert alias_version(client, "qvgen", "champion") == 2
    again = CliRunner().invoke(app, ["promote"])
    assert again.exit_code == 0 and again.output.strip() == "qvgen version 2 is champion already"
    assert len(promotions(client, "qvgen", "champion")) == 2


def test_a_crash_between_record_and_alias_is_repaired(project: Path) -> None:
    client, _ = connect(project)
    client.delete_registered_model_alias("qvgen", "champion")
    assert "has no alias champion" in failed(project)["alias"]
    assert promote_after_run(project) == "qvgen version 1 is champion again, as recorded"
    assert failed(project) == {} and len(promotions(client, "qvgen", "champion")) == 1


def test_a_rollback_is_sealed_and_audited(worse: Path, tmp_path: Path, monkeypatch: Any) -> None:
    project = copy(worse, tmp_path / "project")
    monkeypatch.chdir(project)
    from pipelines.cli.everyday import app

    params = load_params(project / "params.yaml")
    assert promote(project, params, force=True, reason="a demonstration").moved
    back = CliRunner().invoke(app, ["rollback", "--reason", "it is worse"])
    assert back.exit_code == 0 and "qvgen version 1 is champion again, instead of version 2" in back.output, back.output
    report = audit(project, "qvgen@champion")
    assert {check.name: check.state for check in report.checks if not check.ok} == {"promotion": "TODO"}, str(report)
    toy.git(project, "commit", "-qm", "rollback", "metrics/seal.jsonl")
    assert "alias" not in failed(project) and "promotion" not in failed(project)
    toy.git(project, "reset", "-q", "--hard", "HEAD~1")  # as if it was made where there is no project
    assert "`qvgen rollback --to 1 --reason TEXT` seals it" in failed(project)["promotion"]
    assert CliRunner().invoke(app, ["rollback", "--to", "1", "--reason", "as recorded"]).exit_code == 0
    assert {check.state for check in audit(project, "qvgen@champion").checks if not check.ok} == {"TODO"}


def test_a_retraining_commits_the_seal_of_its_promotion(worse: Path, tmp_path: Path) -> None:
    """As the flow does: results, then the gate, then the seal of what it decided, alone in a commit on top."""
    from pipelines.run.retrain import commit_results, keep_promotion

    root = copy(worse, tmp_path / "project")
    head, status = toy.git(root, "rev-parse", "HEAD"), toy.git(root, "status", "--porcelain")
    results = commit_results(root, "Retraining")
    assert results is not None
    assert keep_promotion(root, results, push=False) == results, "nothing was promoted"
    assert promote(root, load_params(root / "params.yaml"), force=True, reason="a test").moved
    assert "promotion" in failed(root), "its line is not in git yet"
    sealed = keep_promotion(root, results, push=False)
    assert sealed is not None and sealed.branch == results.branch
    assert toy.git(root, "log", "-2", "--format=%H %s", sealed.branch).splitlines() == [
        f"{sealed.commit} Seal of the promotion",
        f"{results.commit} Retraining",
    ]
    changed = toy.git(root, "diff", "--unified=0", results.commit, sealed.commit)
    assert re.findall(r"^\+\+\+ b/(.*)$", changed, re.MULTILINE) == ["metrics/seal.jsonl"]
    (line,) = re.findall(r"^\+({.*)$", changed, re.MULTILINE)
    assert json.loads(line)["record"]["reason"] == "a test" and json.loads(line)["kind"] == "promotion"
    assert "promotion" not in failed(root)
    assert (toy.git(root, "rev-parse", "HEAD"), toy.git(root, "status", "--porcelain")) == (head, status)


def test_garbage_collection_is_refused(project: Path, monkeypatch: Any, capsys: Any) -> None:
    assert check_gc(project) == []
    assert "delete nothing that a version needs" in capsys.readouterr().out
    toy.git(project, "reset", "-q", "--hard", "HEAD~1")  # dvc.lock names the packed folder no more
    (loss,) = check_gc(project, run=True)
    assert str(loss).startswith(
        "qvgen/1 (challenger, champion): dvc gc --all-branches --all-tags would delete artifacts/packed"
    )
    with open_blobs(project) as blobs:
        assert blobs.cache.exists(loss.what.partition("(")[2].partition(")")[0]), "refused"
    client, _ = connect(project)
    client.delete_run(client.get_model_version("qvgen", "1").run_id)
    assert [loss.command for loss in check_gc(project)] == ["dvc gc --all-branches --all-tags", "mlflow gc"]


def test_promoting_what_nobody_can_get_warns(project: Path, capsys: Any) -> None:
    params = load_params(project / "params.yaml")
    assert promote(project, params).ok and "nowhere to be had" not in capsys.readouterr().err
    shutil.rmtree(project / ".dvc/cache")
    assert promote(project, params).ok and "nowhere to be had" not in capsys.readouterr().err, "MLflow has them"
    shutil.rmtree(next((project / "mlruns/models").iterdir()))
    assert promote(project, params).ok
    assert "warning: the files of qvgen version 1 are nowhere to be had (" in capsys.readouterr().err


def test_registering_records_the_challenger(worse: Path) -> None:
    client, _ = connect(worse)
    history = promotions(client, "qvgen", "challenger")
    assert [entry.version for entry in history] == [1, 2]
    assert all(isinstance(entry, Promotion) and "registered by run" in entry.reason for entry in history)


def test_tracking_that_is_down_costs_one_warning(project: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    assert promote_after_run(project) == ""
    said = capsys.readouterr().err
    assert said.count("warning: no model was promoted") == 1 and "http://127.0.0.1:9 does not answer" in said
    assert "secret" not in said
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9 does not answer"):
        audit(project, "qvgen@champion")


def test_nothing_registered_is_no_failure(tmp_path: Path) -> None:
    shutil.copy(toy.ROOT / "params.yaml", tmp_path)
    assert promote_after_run(tmp_path).startswith("no model to promote: the registry has no model 'qvgen' (it has: none)")


def test_a_recorded_environment_is_named(project: Path) -> None:
    client, experiment = connect(project)
    (run,) = client.search_runs([experiment], "tags.`dvc.stage` = 'register'")
    client.log_text(run.data.tags["mlflow.parentRunId"], "# Python 3.11.2\na==1\nb==2\n", "environment.txt")
    (check,) = (check for check in audit(project, "qvgen@champion").checks if check.name == "environment")
    assert check.ok and check.detail == "Python 3.11.2, 2 packages, recorded by the parent run"


def test_which_models_used_this_data(worse: Path) -> None:
    md5, found = find_uses(worse, "artifacts/data")
    assert [(use.model, use.aliases, use.stages) for use in sorted(found, key=lambda use: use.model)] == [
        ("qvgen/1", ["champion"], ["pack"]),
        ("qvgen/2", ["challenger"], ["pack"]),
    ]
    assert find_uses(worse, md5.removesuffix(".dir"))[1] == found
    assert [use.model for use in find_uses(worse, "assets/evaluate.json")[1]] == ["qvgen/2"]
    assert len(find_uses(worse, "assets/raw.txt")[1]) == 2
    assert find_uses(worse, "0" * 32)[1] == []
    with pytest.raises(ValueError, match=r"no dvc\.yaml and no \.dvc file"):
        find_uses(worse, "nothing")


def test_the_commands_of_the_guide_work(project: Path) -> None:
    """Every bash block of docs/audit.md, --rebuild included."""
    blocks = re.findall(r"```bash\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) >= 4
    bin = project / ".qvgen" / "bin"
    bin.mkdir(parents=True)
    (bin / "qvgen").write_text('#!/bin/sh\nexec python -m pipelines.cli "$@"\n')
    (bin / "qvgen").chmod(0o755)
    key = bin.parent / "home/.ssh/id_ed25519"  # for the block that signs
    key.parent.mkdir(parents=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    for block in blocks:
        code, output = toy.run(project, "bash", "-euc", f"PATH={bin}:$PATH HOME={key.parents[1]}\n{block}")
        assert code == 0, f"{block}\n{output}"
