"""What is taken out of texts that go to MLflow, into journals and onto the screen, and who may read the journals."""

import os
from pathlib import Path

import pytest

from stages.record.journal import Journal, read_receipt, receipt_path, write_receipt
from stages.record.secrets import host_of, redacted, without_secrets


@pytest.mark.parametrize("password", ["plain", "p@ss", "p/ss", "p@s/s@", "p:a@b/c", "1234/5"])
def test_a_login_is_taken_out_of_an_address_whatever_the_password(password: str) -> None:
    text = f"cannot reach postgresql://user:{password}@db.example.com:5432/mlflow, nor that"
    assert without_secrets(text) == "cannot reach postgresql://db.example.com:5432/mlflow, nor that"


def test_an_address_without_login_stays() -> None:
    for text in ("http://127.0.0.1:5000/#/experiments/1", "sqlite:///mlflow.db", "user@host", "s3://bucket/a"):
        assert without_secrets(text) == text


def test_of_a_webhook_only_the_host_is_shown() -> None:
    assert host_of("https://hooks.example.com/services/T0/B0/abcdef") == "https://hooks.example.com"
    assert host_of("https://user:p@ss@hooks.example.com:8/x") == "https://hooks.example.com"
    for bad in ("T0/B0/abcdef", "http://[abcdef", ""):
        assert host_of(bad) == "(no address)"


DIFFERENCE = """
-  password: hunter2
+  db_password: "correct horse"
+AWS_SECRET_ACCESS_KEY=abcd/efgh
+  "api_key": "0123456789",
+url = "https://user:s3cr@t@host/x"
+x = "ghp_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
+-----BEGIN RSA PRIVATE KEY-----
+MIIEfirst
+MIIEsecond
+-----END RSA PRIVATE KEY-----
+  learning_rate: 4.0e-3
+  max_sequence_length: 12
"""
SECRETS = ("hunter2", "correct horse", "abcd/efgh", "0123456789", "s3cr", "ghp_", "MIIE")


def test_a_difference_keeps_its_code_and_loses_its_secrets() -> None:
    found = redacted(DIFFERENCE)
    assert [secret for secret in SECRETS if secret in found] == []
    for kept in ("db_password: ***", "https://host/x", "learning_rate: 4.0e-3", "max_sequence_length: 12"):
        assert kept in found


def test_only_the_owner_may_read_a_journal(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        journal = Journal.create(tmp_path, "a", "pipeline-1", tags={}, params={})
        write_receipt(journal.path, {"run_id": "1"})
    finally:
        os.umask(old)
    assert read_receipt(journal.path) == {"run_id": "1"}
    assert [oct(path.stat().st_mode & 0o777) for path in (journal.path, receipt_path(journal.path))] == ["0o600", "0o600"]
