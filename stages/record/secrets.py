"""Secrets taken out of texts. Every text that goes to MLflow, into a journal or onto the screen passes through here.

In doubt a passage is taken out: these texts explain a run, nothing is computed from them.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from qvgen.hub.address import without_secrets

__all__ = ["GONE", "host_of", "redacted", "without_secrets"]

GONE = "***"
# A name that ends like this, and what is assigned to it: in YAML, JSON, TOML, .env and code.
_ASSIGNED = re.compile(
    r"(?i)(?P<name>[\w.\-]*(?:password|passwd|passphrase|secret|token|api_?key|access_?key(?:_id)?|private_?key|credentials?|"
    r"webhook|auth)[\"']?\s*(?:=|:(?!//))\s*)(?P<value>\"[^\"]*\"|'[^']*'|[^\s,#][^,#\n]*)"
)
# Keys that services give out, by their own prefixes (GitHub, GitLab, Hugging Face, Slack, AWS, OpenAI, Google), and JWTs.
_KEY = re.compile(
    r"\b(?:gh[opsur]_\w{20,}|github_pat_\w{20,}|glpat-[\w\-]{16,}|hf_\w{20,}|xox[abeprs]-[\w\-]{10,}|(?:AKIA|ASIA)[0-9A-Z]{16}|"
    r"sk-[\w\-]{20,}|AIza[\w\-]{30,}|eyJ[\w\-]{10,}\.[\w\-]{10,}\.[\w\-]*)"
)
_PEM = re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)


def host_of(address: str) -> str:
    """Scheme and host alone: the path of a webhook is its password. "(no address)" for anything else."""
    try:
        parts = urlsplit(without_secrets(address.strip()))
        return f"{parts.scheme}://{parts.hostname}" if parts.scheme and parts.hostname else "(no address)"
    except ValueError:
        return "(no address)"


def redacted(text: str) -> str:
    """A text such as a difference of files, without logins in addresses, values of names such as `api_key`, keys that are
    known by their form, and private keys."""
    text = _PEM.sub(rf"\1{GONE}\2", without_secrets(text))
    text = _ASSIGNED.sub(lambda found: found["name"] + GONE, text)
    return _KEY.sub(GONE, text)
