"""Checks of `qvgen audit` on the bytes themselves: packed model, data, metrics; and on the environment."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pipelines.audit.blobs import Blobs, RemoteError, file_hash
from pipelines.audit.checks import ANEW, COMMIT, SHA256, Check, known, verdict
from pipelines.audit.lineage import Lineage
from pipelines.audit.project import WORKTREE, Kept, Project
from stages.register import MEASURED, leaves

_CHECKOUT = "the registry is right, this folder is another one: `dvc checkout --force artifacts/packed`"


def data_checks(lineage: Lineage, project: Project, blobs: Blobs, lock_commit: str | None) -> Iterator[Check]:
    """Packed model, data and metrics: the bytes themselves."""
    packed, md5 = lineage.packed
    cached, in_git = _outputs(lineage, project)
    cached[packed, md5] = None
    found = {key: _stored(blobs, key[1]) for key in cached}
    faults = {key: [f"{key[0]}: {fault}" for fault in stored[1]] for key, stored in found.items()}
    fix = "`dvc pull` where a remote has it, `dvc push` where a cache has it, or rebuild it"
    yield verdict("packed model", faults[packed, md5], f"{packed} {md5}, {found[packed, md5][0]} files", fix)
    others = [key for key in cached if key != (packed, md5)]
    count = sum(found[key][0] for key in others)
    detail = f"{', '.join(path for path, _ in others) or 'none'}: {count} files are in {blobs.where}"
    yield verdict("data", [fault for key in others for fault in faults[key]], detail, fix)
    yield _sha256_check(lineage, blobs)
    yield _metrics_check(lineage, project, in_git, lock_commit)


def _outputs(lineage: Lineage, project: Project) -> tuple[dict[tuple[str, str], None], dict[str, str]]:
    """Outputs and sources of the lineage as (path, hash): what DVC's cache keeps, and what git keeps (path -> hash)."""
    cached: dict[tuple[str, str], None] = {}
    in_git: dict[str, str] = {}
    for step in lineage.steps:
        if not known(step, project):
            continue
        kept: dict[str, Kept] = project.at(step.commit or "").outs
        for path, md5 in {**step.deps, **step.outs}.items():
            if path in kept and kept[path].cached:
                cached[path, md5] = None
            elif path in kept and not kept[path].always:
                in_git[path] = md5
    return cached, in_git


def _stored(blobs: Blobs, md5: str) -> tuple[int, list[str]]:
    """Number of files under a hash, and what is wrong with them."""
    try:
        files = blobs.files(md5)
    except FileNotFoundError:
        return 0, [f"{md5} is missing in {blobs.where}"]
    except ValueError as error:
        return 0, [str(error)]
    names = files if "" in files else {"": md5, **files}  # a folder's own list, too
    faults = ((name, blobs.fault(value)) for name, value in names.items())
    return len(files), [f"{name or 'the whole'}: {fault}" for name, fault in faults if fault]


def _sha256_check(lineage: Lineage, blobs: Blobs) -> Check:
    tags = {key.removeprefix(SHA256): value for key, value in lineage.version.tags.items() if key.startswith(SHA256)}
    if not tags:
        return Check("sha256", "FAIL", f"the version has no sha256 of its weights; {ANEW}")
    try:
        files = blobs.files(lineage.packed[1])
    except (FileNotFoundError, ValueError):
        return Check("sha256", "FAIL", "the packed model's list of files cannot be read; see packed model")
    faults = []
    for name, expected in tags.items():
        try:
            found = blobs.sha256(files[name]) if name in files else None
        except RemoteError as error:
            faults.append(f"{name}: {error}")
            continue
        if found != expected:
            faults.append(f"{name} was registered with {expected[:16]}..., stored is {found or 'nothing'}")
    return verdict("sha256", faults, f"{len(tags)} files as registered", "do not use these weights: `dvc pull`, or rebuild")


def _metrics_check(lineage: Lineage, project: Project, in_git: dict[str, str], lock_commit: str | None) -> Check:
    if lock_commit is None:
        return Check("metrics", "FAIL", "without a commit that has dvc.lock there is none that has the metrics; see dvc.lock")
    contents = {path: project.show(lock_commit, path) for path in in_git}
    where = lock_commit[:12] or "this checkout"
    faults = [
        f"{path} in {where} is {'absent' if content is None else 'other bytes'} than the run wrote"
        for path, content in contents.items()
        if content is None or hashlib.md5(content, usedforsecurity=False).hexdigest() != in_git[path]
    ]
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    if not faults:
        for path in MEASURED:
            more, words = leaves(_json(contents.get(path)))
            numbers, texts = numbers | more, texts | words
        registered = {m.key: m.value for m in (lineage.model.metrics if lineage.model else None) or []}
        tags = {"the version": lineage.version.tags, "the logged model": lineage.model.tags if lineage.model else {}}
        faults += [
            f"{name} is {registered.get(name, 'absent')} in the registry, {numbers.get(name, 'absent')} in {where}"
            for name in sorted(numbers.keys() | registered.keys())
            if registered.get(name) != numbers.get(name)
        ]
        faults += [
            f"{name} is {found.get(name, 'absent')} in the tags of {owner}, {value} in {where}"
            for owner, found in tags.items()
            for name, value in texts.items()
            if found.get(name) != value
        ]
    detail = f"{len(numbers)} registered numbers and {len(texts)} texts are those of git's {len(in_git)} metrics files"
    if not faults and lock_commit == WORKTREE:
        return Check("metrics", "TODO", f"{detail}, not committed yet; {COMMIT}")
    return verdict("metrics", faults, detail, "commit metrics/ as the run left it")


def environment_check(lineage: Lineage, project: Project, texts: dict[str, str]) -> Check:
    """`texts`: what the parent run recorded of its environment, by name; else the pins of the commit count."""
    if recorded := texts.get("environment.txt"):
        first, *packages = recorded.splitlines()
        return Check("environment", "PASS", f"{first.lstrip('# ')}, {len(packages)} packages, recorded by the parent run")
    commit = lineage.commits[0] if lineage.commits else ""
    if commit and project.show(commit, "constraints.txt") is not None:
        return Check("environment", "PASS", f"pinned by constraints.txt in {commit[:12]}; the run itself recorded none")
    return Check("environment", "FAIL", f"neither recorded by the run nor pinned in {commit[:12] or 'any commit'}")


def _json(content: bytes | None) -> dict[str, Any]:
    return {} if content is None else json.loads(content)


def workspace_check(lineage: Lineage, project: Project, blobs: Blobs) -> Check:
    """Whether the packed folder in this checkout, which is the one people load, is the model that was audited."""
    path, md5 = lineage.packed
    folder = project.root / path
    if not folder.exists():
        return Check("workspace", "PASS", f"{path} is not checked out")
    try:
        expected = blobs.files(md5)
    except (FileNotFoundError, ValueError):
        return Check("workspace", "WARN", f"{path} cannot be compared: its list of files cannot be read; see packed model")
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()] if folder.is_dir() else []
    found = {file.relative_to(folder).as_posix(): file_hash(file, "md5") for file in files}
    differing = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if not differing:
        return Check("workspace", "PASS", f"{path} here has the audited bytes")
    told = verdict("workspace", [f"{path}/{name} is {_how(name, expected, found)}" for name in differing], "", _CHECKOUT)
    return Check("workspace", "WARN", told.detail)


def _how(name: str, expected: dict[str, str], found: dict[str, str]) -> str:
    return "missing" if name not in found else "not part of it" if name not in expected else "not what was audited"
