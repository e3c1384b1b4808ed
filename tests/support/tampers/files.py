"""Changes of what git, DVC's cache and the checkout keep."""

from __future__ import annotations

import os

from tests.support import audited_project as toy
from tests.support.tampers.spoiled import Spoiled, Tamper

_SEAL = "metrics/seal.jsonl"
_LATER, _HERE = "later work is normal", "what is not committed is no evidence"
_REPLACED = "`git replace` changes what this clone shows; the audit asks for the commit itself"
_WEIGHTS = "transformer/weights.safetensors"


_FORGET_UPLOAD = "DELETE FROM model_version_tags WHERE key = 'qvgen.upload'"


def _swapped(p: Spoiled) -> None:
    """Two files of the uploaded model under each other's name."""
    found: list[bytes] = []
    for name in (_WEIGHTS, "transformer/config.json"):
        p.uploaded(name, lambda content: (found.append(content), content)[1])
    p.uploaded(_WEIGHTS, lambda _: found[1])
    p.uploaded("transformer/config.json", lambda _: found[0])


def _without_line(p: Spoiled, kind: str, *, amend: bool) -> None:
    file = p.root / _SEAL
    lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if f'"kind": "{kind}"' not in line]
    assert len(kept) < len(lines)
    file.write_text("".join(kept))
    toy.git(p.root, "commit", "-qam", "results", *(["--amend"] if amend else []))


def _replaced(p: Spoiled) -> None:
    """Another commit, with other code, in the place of the one that the runs began in, for whoever asks git."""
    first = toy.git(p.root, "rev-list", "--max-parents=0", "HEAD")
    p.edit("stages/pack.py", "import hashlib", "import os, hashlib")
    toy.git(p.root, "add", "stages/pack.py")
    tree = toy.git(p.root, "write-tree")
    toy.git(p.root, "reset", "-q", "--hard")
    toy.git(p.root, "replace", "-f", first, toy.git(p.root, "commit-tree", tree, "-m", "other"))


def _new_history(p: Spoiled) -> None:
    toy.git(p.root, "checkout", "-q", "--orphan", "other")
    toy.git(p.root, "commit", "-qam", "all at once")
    for branch in toy.git(p.root, "for-each-ref", "--format=%(refname:short)", "refs/heads").split():
        if branch != "other":
            toy.git(p.root, "branch", "-qD", branch)


GIT = {
    "a parameter in dvc.lock": Tamper("dvc.lock", lambda p: p.amend("dvc.lock", "seed: ", "seed: 1")),
    "a command in dvc.lock": Tamper("dvc.lock", lambda p: p.amend("dvc.lock", "stages.pack", "stages.pack2")),
    "a hash in dvc.lock": Tamper("dvc.lock", lambda p: p.amend("dvc.lock", "md5: ", "md5: 0")),
    "a stage of dvc.lock": Tamper("dvc.lock", lambda p: p.amend("dvc.lock", "  prepare:", "  other:")),
    "an input more in dvc.lock": Tamper(
        "dvc.lock", lambda p: p.amend("dvc.lock", "    deps:\n", "    deps:\n    - path: assets/more\n      md5: '00'\n")
    ),
    "a code in dvc.lock": Tamper("dvc.lock", lambda p: p.amend("dvc.lock", "code.pack: ", "code.pack: 0")),
    "dvc.lock is no YAML": Tamper("dvc.lock", lambda p: p.amend("dvc.lock", "stages:", "stages: [")),
    "metrics/evaluate.json": Tamper("metrics", lambda p: p.amend("metrics/evaluate.json", "{", '{"more": 1, ')),
    "metrics/register.json": Tamper("metrics", lambda p: p.amend("metrics/register.json", '"version": 1', '"version": 2')),
    "a parameter in the seal": Tamper("seal", lambda p: p.amend(_SEAL, '"seed": "', '"seed": "1')),
    "a curve in the seal": Tamper("seal", lambda p: p.amend(_SEAL, '"loss": "', '"loss": "0')),
    "a reason in the seal": Tamper("promotion", lambda p: p.amend(_SEAL, "passed the gate", "best ever")),
    "a line of the seal is no JSON": Tamper("seal", lambda p: p.amend(_SEAL, "{", "[")),
    "the seal of a run is gone": Tamper("seal", lambda p: _without_line(p, "run", amend=True)),
    "the seal of the execution is gone": Tamper("seal", lambda p: _without_line(p, "execution", amend=True)),
    "the seal of the promotion is gone": Tamper("promotion", lambda p: _without_line(p, "promotion", amend=True)),
    "the seal is rewritten later": Tamper("seal", lambda p: p.follow(_SEAL, '"seed": "', '"seed": "1')),
    "the seal is shortened later": Tamper("seal", lambda p: _without_line(p, "run", amend=False)),
    "the results are not committed": Tamper("dvc.lock", lambda p: toy.git(p.root, "reset", "-q", "HEAD~1")),
    "the results are gone": Tamper("dvc.lock", lambda p: toy.git(p.root, "reset", "-q", "--hard", "HEAD~1")),
    "a commit replaced": Tamper("", _replaced, _REPLACED),
    "history written anew": Tamper("commit", _new_history),
    "code later": Tamper("", lambda p: p.follow("stages/pack.py", "import hashlib", "import os, hashlib"), _LATER),
    "a parameter later": Tamper("", lambda p: p.follow("params.yaml", "seed: ", "seed: 1"), _LATER),
    "a parameter here": Tamper("", lambda p: p.edit("params.yaml", "seed: ", "seed: 1"), _HERE),
    "dvc.lock here": Tamper("", lambda p: p.edit("dvc.lock", "md5: ", "md5: 0"), _HERE),
}

BYTES = {
    "packed weights in the cache": Tamper("packed model", lambda p: p.blob("artifacts/packed", _WEIGHTS).write_bytes(b"x")),
    "packed weights gone": Tamper("packed model", lambda p: p.blob("artifacts/packed", _WEIGHTS).unlink()),
    "packed weights empty": Tamper("sha256", lambda p: os.truncate(p.blob("artifacts/packed", _WEIGHTS), 0)),
    "packed config in the cache": Tamper(
        "packed model", lambda p: p.blob("artifacts/packed", "transformer/config.json").write_text("{}")
    ),
    "packed list in the cache": Tamper("packed model", lambda p: p.blob("artifacts/packed", None).write_text("[]")),
    "packed list is no list": Tamper("packed model", lambda p: p.blob("artifacts/packed", None).write_text("[")),
    "packed list gone": Tamper("packed model", lambda p: p.blob("artifacts/packed", None).unlink()),
    "data in the cache": Tamper("data", lambda p: p.blob("artifacts/data", "1.txt").write_text("other")),
    "data gone": Tamper("data", lambda p: p.blob("artifacts/data", "1.txt").unlink()),
    "data list gone": Tamper("data", lambda p: p.blob("artifacts/data", None).unlink()),
    "source in the cache": Tamper("data", lambda p: p.blob("assets/raw.txt", "").write_text("other")),
    "source gone": Tamper("data", lambda p: p.blob("assets/raw.txt", "").unlink()),
    "weights here": Tamper("workspace", lambda p: p.packed(_WEIGHTS, lambda content: content[:-1] + b"!")),
    "weights here gone": Tamper("workspace", lambda p: p.packed(_WEIGHTS, lambda _: None)),
    "a file here more": Tamper("workspace", lambda p: p.packed("transformer/adapter.safetensors", lambda _: b"x")),
    "config here": Tamper("workspace", lambda p: p.packed("transformer/config.json", lambda content: content + b" ")),
    "uploaded weights": Tamper("uploaded", lambda p: p.uploaded(_WEIGHTS, lambda content: content[:-1] + b"!")),
    "uploaded config": Tamper("uploaded", lambda p: p.uploaded("transformer/config.json", lambda content: content + b" ")),
    "uploaded weights gone": Tamper("uploaded", lambda p: p.uploaded(_WEIGHTS, lambda _: None)),
    "uploaded files swapped": Tamper("uploaded", _swapped),
    "an uploaded file more": Tamper("uploaded", lambda p: p.uploaded("transformer/adapter.safetensors", lambda _: b"x")),
    "the code that MLflow loads": Tamper("uploaded", lambda p: p.uploaded("../../qvgen_model.py", lambda _: b"import os")),
    "how MLflow loads it": Tamper("uploaded", lambda p: p.uploaded("../../MLmodel", lambda content: content + b" ")),
    "no word of the upload": Tamper("seal", lambda p: p.sql(_FORGET_UPLOAD)),
    "the code here": Tamper("", lambda p: p.edit("stages/pack.py", "import hashlib", "import os, hashlib"), "not committed"),
}
