"""Signatures of the seal, by SSH keys: who can rewrite database, files and git all at once still lacks the key.

A signature is a line of metrics/seal.jsonl itself. It signs the hash of the line before, which names the hash of the line
before that: all of them are covered. The keys that count are in a file `allowed_signers` (ssh-keygen(1)): that of the
auditor, else the one that the repository keeps. The repository's own is no help against somebody who rewrites the repository.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.audit.checks import Check
from pipelines.audit.lineage import Lineage
from pipelines.audit.project import WORKTREE, Project
from qvgen.hub.promotions import Promotion
from stages.record.seal import FILE, FIRST, add, read_lines

NAMESPACE = "qvgen-seal"  # a signature made for something else does not count
SIGNERS = "allowed_signers"
KIND = "signature"
_COMMIT = f"`git add {FILE} && git commit -m Signed`"
SECONDS = 60.0  # a key on a token waits for a finger


@dataclass(frozen=True)
class Signed:
    """What was signed: lines of the seal, counted."""

    lines: int
    by: str | None  # None: no allowed_signers file names the key


def sign(root: Path, key: Path) -> Signed:
    """Sign the newest line of the seal, and with it all that it follows, with the SSH key `key` (a public key, if an agent
    holds the private one), as another line. Raises ValueError if there is nothing to sign or ssh-keygen refuses."""
    path = root / FILE
    lines = path.read_text().splitlines() if path.is_file() else []
    if not lines:
        raise ValueError(f"{path} has no line to sign: run the pipeline first")
    if not key.is_file():
        raise ValueError(f"{key} is no file: name an SSH key with --key, such as ~/.ssh/id_ed25519")
    head = _sha256(lines[-1])
    with tempfile.TemporaryDirectory() as folder:
        message = Path(folder) / "head"
        message.write_bytes(_message(head))
        done = _keygen("-Y", "sign", "-q", "-f", str(key), "-n", NAMESPACE, str(message), ask=True)
        if done.returncode:
            raise ValueError(f"ssh-keygen does not sign with {key}: {done.stderr.decode(errors='replace').strip()}")
        signature = message.with_name("head.sig").read_text()
    add(root, [{"kind": KIND, "id": head, "signature": signature}])
    signers = root / SIGNERS
    by = _signer(signature, head, signers.read_bytes()) if signers.is_file() else None
    return Signed(len(lines), by)


def signature_check(
    project: Project, lineage: Lineage, promoted: tuple[str, Promotion] | None, lock_commit: str | None, given: Path | None
) -> Check:
    """Every line of the lineage's runs, their executions and the newest move of the alias (`promoted`: its name and record) is
    covered by a signature of a key in `given`, else in the repository's allowed_signers."""
    remedy = f"`qvgen sign --key KEY`, then {_COMMIT}"
    signers, whose = (given.read_bytes(), str(given)) if given else (project.show("HEAD", SIGNERS), f"git's {SIGNERS}")
    if signers is None:
        if gone := project.git("log", "-1", "--format=%h", "--all", "--", SIGNERS):
            return Check("signature", "FAIL", f"{SIGNERS} is not in HEAD, but commit {gone} has it: who removed it, and why?")
        detail = f"nobody has to sign: there is no {SIGNERS}; somebody who rewrites git too would not be noticed"
        return Check("signature", "PASS", detail)
    if lock_commit is None:
        return Check("signature", "FAIL", f"without a commit that has dvc.lock there is none that has {FILE}; see dvc.lock")
    wanted = _wanted(lineage, promoted)
    for where in (lock_commit, *project.later_commits(lock_commit, str(FILE)), "HEAD", WORKTREE):
        text = (project.show(where, str(FILE)) or b"").decode(errors="replace")
        lines = {(str(line.get("kind")), str(line.get("id"))): _sha256(raw) for raw, line in _pairs(text)}
        by, covered, broken = _covered(text, signers)
        missing = [name for key, name in wanted.items() if lines.get(key) not in covered]
        if not missing:
            if where == WORKTREE:
                return Check(
                    "signature", "TODO", f"signed by {', '.join(by)}, not committed yet; {remedy.partition(', then ')[2]}"
                )
            keys = hashlib.sha256(signers).hexdigest()[:12]
            detail = f"{len(wanted)} lines of the seal are signed by {', '.join(by)} (keys of {whose}, sha256 {keys})"
            return Check("signature", "PASS", detail)
    why = f"; {len(broken)} signatures are of other keys, or of other lines" if broken else ""
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return Check("signature", "FAIL", f"not signed by a key of {whose}: {', '.join(missing[:3])}{more}{why}; {remedy}")


def _wanted(lineage: Lineage, promoted: tuple[str, Promotion] | None) -> dict[tuple[str, str], str]:
    """(kind, id) of a line -> what it is, for people."""
    wanted = {("run", step.tags.get("journal.id", "")): str(step) for step in lineage.steps}
    for parent in lineage.parents.values():
        wanted["execution", parent.tags.get("journal.id", f"pipeline-{parent.id}")] = str(parent)
    if promoted is not None:
        wanted["promotion", f"{promoted[0]} {promoted[1].time}"] = f"the move of {promoted[0]}"
    return wanted


def _covered(text: str, signers: bytes) -> tuple[list[str], set[str], list[str]]:
    """Who signed, hashes of the lines that are covered, and heads whose signature does not hold."""
    previous: dict[str, str] = {}
    signatures: list[tuple[str, str]] = []
    for raw, line in _pairs(text):
        previous[_sha256(raw)] = str(line.get("previous"))
        if line.get("kind") == KIND:
            signatures.append((str(line.get("previous")), str(line.get("signature"))))
    by: dict[str, None] = {}
    covered: set[str] = set()
    broken = []
    for head, signature in signatures:
        who = _signer(signature, head, signers)
        if who is None:
            broken.append(head)
            continue
        by[who] = None
        while head in previous and head != FIRST and head not in covered:
            covered.add(head)
            head = previous[head]
    return list(by), covered, broken


def _pairs(text: str) -> list[tuple[str, Mapping[str, Any]]]:
    return [(raw, found[0]) for raw in text.splitlines() if (found := read_lines(raw))]


def _signer(signature: str, head: str, signers: bytes) -> str | None:
    """The name under which the file of signers has the key; None if it has not, or the signature is of something else."""
    with tempfile.TemporaryDirectory() as folder:
        keys, sig = Path(folder) / "keys", Path(folder) / "sig"
        keys.write_bytes(signers)
        sig.write_text(signature)
        files = ("-f", str(keys), "-s", str(sig))
        found = _keygen("-Y", "find-principals", *files)
        for name in found.stdout.decode(errors="replace").splitlines() if found.returncode == 0 else ():
            if _keygen("-Y", "verify", "-I", name, "-n", NAMESPACE, *files, input=_message(head)).returncode == 0:
                return name
    return None


def _keygen(*arguments: str, input: bytes | None = None, ask: bool = False) -> subprocess.CompletedProcess[bytes]:
    """`ask`: it may ask for the passphrase of a key, on the terminal."""
    given: dict[str, Any] = {"input": input} if input is not None else {} if ask else {"stdin": subprocess.DEVNULL}
    try:
        return subprocess.run(["ssh-keygen", *arguments], capture_output=True, timeout=SECONDS, check=False, **given)
    except FileNotFoundError:
        raise ValueError("there is no ssh-keygen, which makes and checks signatures: install openssh-client") from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"ssh-keygen gave no answer within {SECONDS:g} s") from None


def _message(head: str) -> bytes:
    return f"{head}\n".encode()


def _sha256(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()
