"""Signatures of the seal by real SSH keys, and provenance that a program of others accepts."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pipelines.audit.report import audit
from pipelines.audit.signature import NAMESPACE, SIGNERS, sign
from stages.record.connection import connect
from stages.record.seal import FILE, FIRST, curve_hash, text_hash
from tests.support import audited_project as toy
from tests.support.audited_project import copy, failed, git

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen found: `apt-get install openssh-client`"),
]


@pytest.fixture(scope="module", autouse=True)
def _embedded_tracking() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


def new_key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", str(path)], check=True)
    return path


def signers_of(key: Path, name: str) -> str:
    return f'{name} namespaces="{NAMESPACE}" {key.with_suffix(".pub").read_text()}'


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ada", "eve"):
        new_key(folder / name)
        (folder / f"{name}.signers").write_text(signers_of(folder / name, f"{name}@example.com"))
    return folder


@pytest.fixture(scope="module")
def signed(champion: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project whose seal Ada has signed, with her key in allowed_signers."""
    root = copy(champion, tmp_path_factory.mktemp("signed") / "project")
    shutil.copy(keys / "ada.signers", root / SIGNERS)
    toy.commit(root, "signers")
    unsigned = failed(root)
    assert unsigned.keys() == {"signature"}, unsigned
    assert "not signed by a key of git's allowed_signers: register (run " in unsigned["signature"]
    code, output = toy.run(root, "qvgen", "sign", "--key", str(keys / "ada"))
    assert code == 0 and "lines of metrics/seal.jsonl are signed" in output and "warning" not in output, output
    (waiting,) = (check for check in audit(root, "qvgen@champion").checks if check.name == "signature")
    assert waiting.state == "TODO" and "signed by ada@example.com, not committed yet" in waiting.detail
    toy.commit(root, "Signed")
    return root


def test_what_is_signed_passes_and_says_by_whom(signed: Path, keys: Path) -> None:
    report = audit(signed, "qvgen@champion", signers=keys / "ada.signers")
    assert report.ok, str(report)
    (check,) = (check for check in report.checks if check.name == "signature")
    assert "are signed by ada@example.com" in check.detail
    assert audit(signed, "qvgen@champion").ok


def test_the_auditors_own_keys_count(signed: Path, keys: Path) -> None:
    code, output = toy.run(signed, "qvgen", "audit", "qvgen@champion", "--signers", str(keys / "eve.signers"))
    assert code == 1 and "not signed by a key of" in output and "1 signatures are of other keys" in output, output


def test_a_signature_for_something_else_does_not_count(champion: Path, keys: Path, tmp_path: Path) -> None:
    """Ada's key, but a signature that she gave for a file, or for git."""
    root = copy(champion, tmp_path / "project")
    last = (root / FILE).read_text().splitlines()[-1]
    head = text_hash(last.encode())
    (tmp_path / "head").write_text(f"{head}\n")
    subprocess.run(
        ["ssh-keygen", "-Y", "sign", "-q", "-f", str(keys / "ada"), "-n", "file", str(tmp_path / "head")], check=True
    )
    line = {"kind": "signature", "id": head, "signature": (tmp_path / "head.sig").read_text(), "previous": head}
    (root / FILE).write_text((root / FILE).read_text() + json.dumps(line, sort_keys=True) + "\n")
    shutil.copy(keys / "ada.signers", root / SIGNERS)
    toy.commit(root, "signed")
    assert failed(root).keys() == {"signature"}


def test_only_the_signature_catches_who_rewrites_database_files_and_git(signed: Path, keys: Path, tmp_path: Path) -> None:
    root = copy(signed, tmp_path / "project")
    forge(root)
    faults = failed(root)
    assert faults.keys() == {"signature"}, faults
    assert "signatures are of other keys, or of other lines" in faults["signature"]

    # One who also puts a key of their own into allowed_signers deceives the repository, and not an auditor with the right one.
    shutil.copy(keys / "eve.signers", root / SIGNERS)
    toy.commit(root, "signers")
    sign(root, keys / "eve")
    toy.commit(root, "Signed")
    assert failed(root) == {}
    (check,) = (c for c in audit(root, "qvgen@champion", signers=keys / "ada.signers").checks if not c.ok)
    assert check.name == "signature" and check.state == "FAIL"

    (root / SIGNERS).unlink()
    toy.commit(root, "nobody signs")
    assert "is not in HEAD, but commit" in failed(root)["signature"]


def forge(root: Path) -> None:
    """Another loss curve and another reason for the promotion, in MLflow, in the seal with its chain, and in git's history."""
    with closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        assert database.execute("UPDATE metrics SET value = value / 2 WHERE key = 'loss'").rowcount
        assert database.execute("UPDATE latest_metrics SET value = value / 2 WHERE key = 'loss'").rowcount
        query = "UPDATE registered_model_tags SET value = replace(value, 'passed the gate', 'looked good')"
        assert database.execute(f"{query} WHERE key LIKE 'promotion.champion.%'").rowcount
    client, experiment = connect(root)
    runs = {run.data.tags["journal.id"]: run for run in client.search_runs([experiment]) if "journal.id" in run.data.tags}
    previous, lines = FIRST, []
    for line in (root / FILE).read_text().splitlines():
        entry = json.loads(line) | {"previous": previous}
        if entry["kind"] == "promotion":
            entry["record"]["reason"] = "looked good"
        if entry["kind"] == "run" and "loss" in entry["metrics"]:
            points = client.get_metric_history(runs[entry["id"]].info.run_id, "loss")
            entry["metrics"]["loss"] = curve_hash((point.step, point.value) for point in points)
        lines.append(json.dumps(entry, sort_keys=True))
        previous = text_hash(lines[-1].encode())
    (root / FILE).write_text("\n".join(lines) + "\n")
    git(root, "reset", "-q", "--soft", git(root, "rev-list", "--max-parents=0", "HEAD"))
    toy.commit(root, "results")
    git(root, "reflog", "expire", "--expire=now", "--all")
    git(root, "gc", "-q", "--prune=now")


def test_provenance_is_accepted_by_the_library_of_the_format(champion: Path, tmp_path: Path) -> None:
    """in-toto-attestation, by the makers of the format: a field that it does not know is an error."""
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance  # pyright: ignore[reportAttributeAccessIssue]
    from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
    from in_toto_attestation.v1.statement import Statement
    from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage  # pyright: ignore[reportAttributeAccessIssue]

    file = tmp_path / "slsa.json"
    code, output = toy.run(champion, "qvgen", "audit", "qvgen@champion", "--slsa", str(file))
    assert code == 0, output
    content = json.loads(file.read_text())
    statement = Statement.copy_from_pb(json_format.ParseDict(content, StatementMessage()))
    statement.validate()
    assert content["predicateType"] == "https://slsa.dev/provenance/v1"
    provenance = json_format.ParseDict(content["predicate"], Provenance())
    build, details = provenance.build_definition, provenance.run_details
    for descriptor in [*build.resolved_dependencies, *details.byproducts]:
        ResourceDescriptor.copy_from_pb(descriptor).validate()
    assert build.build_type and details.builder.id and details.metadata.started_on.seconds
    weights = text_hash((champion / "artifacts/packed/transformer/weights.safetensors").read_bytes())
    subjects = {subject.name: subject.digest["sha256"] for subject in statement.pb.subject}
    assert subjects["artifacts/packed/transformer/weights.safetensors"] == weights
    start = git(champion, "rev-list", "--max-parents=0", "HEAD")
    dependencies = {descriptor.name: dict(descriptor.digest) for descriptor in build.resolved_dependencies}
    assert dependencies["source"] == {"gitCommit": start} and "md5" in dependencies["assets/raw.txt"]
    assert content["predicate"]["buildDefinition"]["externalParameters"]["parameters"]["seed"] == "0"


def test_no_provenance_of_what_fails(champion: Path, tmp_path: Path) -> None:
    root = copy(champion, tmp_path / "project")
    with closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        database.execute("UPDATE params SET value = '7' WHERE key = 'seed'")
    code, output = toy.run(root, "qvgen", "audit", "qvgen@champion", "--slsa", str(tmp_path / "slsa.json"))
    assert code == 1 and "is not written: not every claim holds" in output and not (tmp_path / "slsa.json").exists()
