"""`qvgen status`: which stages would run, and why, in plain words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.run.dag import in_order, pipeline_stages, read_graph, stages_of, with_upstream
from stages import observe
from stages.runtime.dvc import flatten, open_project, stage_address

OBSERVE = "stages/dvc.yaml:observe"
_WORDS = {"modified": "changed", "new": "is new", "deleted": "is missing", "not in cache": "is not in DVC's cache"}
_FOLDERS = {"fetch": "fetch.source", "prepare": "prepare.folder"}  # stage -> the parameter that names what it reads
_SAID = {"changed command": "the command changed"}


@dataclass(frozen=True)
class StageStatus:
    """`reasons` is empty for a stage that is up to date; `upstream` names stages before it that would run."""

    stage: str
    reasons: tuple[str, ...]
    upstream: tuple[str, ...]

    @property
    def runs(self) -> bool:
        return bool(self.reasons or self.upstream)


def read_status(root: Path, targets: Sequence[str] = ()) -> list[StageStatus]:
    """Every stage of the root's dvc.yaml, or `targets` and what they need, in the order they run. Raises ValueError for a
    stage that no dvc.yaml has."""
    graph, facts = read_graph(root), observe.texts(root)
    chosen = with_upstream(graph, set(targets) or pipeline_stages(graph))
    with open_project(root) as repo, repo.lock:
        stages = {stage_address(stage): stage for stage in stages_of(repo)}
        reasons = {name: tuple(_reasons(stages[name], facts)) for name in chosen}
    found: dict[str, StageStatus] = {}
    for name in in_order({name: graph[name] for name in chosen}):
        # A frozen stage does not follow its dependencies.
        needs = sorted(graph[name] - {OBSERVE})  # what it would write is asked for directly
        upstream = () if stages[name].frozen else tuple(up for up in needs if found[up].runs)
        found[name] = StageStatus(name, reasons[name], upstream)
    return list(found.values())


def show(root: Path, targets: Sequence[str] = ()) -> None:
    found = read_status(root, targets)
    width = max((len(status.stage) for status in found), default=0)
    for status in found:
        said = list(status.reasons) + ([f"after {', '.join(status.upstream)}"] if status.upstream else [])
        first, *more = said or ["up to date"]
        print(f"{status.stage:<{width}}  {'run' if status.runs else ' - '}  {first}")
        for reason in more:
            print(f"{'':<{width}}       {reason}")
    count = sum(status.runs for status in found)
    print(f"\n{count} of {len(found)} stages would run; one whose inputs turn out equal is skipped then")


def _reasons(stage: Any, facts: dict[Path, str]) -> Iterator[str]:
    """Reasons from DVC's status of a stage: texts, and {"changed deps" or "changed outs": {path: what}}. `facts` is what
    stage observe would write now; DVC knows only what it wrote last."""
    if stage.always_changed or stage.is_callback:  # a callback has neither dependencies nor outputs
        yield "runs every time"
    if stage.is_callback:
        return
    if not any(part.hash_info for part in (*stage.deps, *stage.outs)):  # dvc.lock does not have it
        yield "never ran"
        return
    yield from _observed(stage, facts)
    for entries in stage.status(check_updates=False).values():
        for entry in entries:
            if isinstance(entry, str):
                if entry != "always changed":
                    yield _SAID.get(entry, entry)
                continue
            for kind, changes in entry.items():
                for path, change in changes.items():
                    if Path(path) not in facts:
                        yield from _told(stage, "output " if kind == "changed outs" else "", path, change)


def _observed(stage: Any, facts: dict[Path, str]) -> Iterator[str]:
    recorded, _ = _values(stage, str(observe.CODE))
    code = json.loads(facts[observe.CODE])["code"]
    if recorded and flatten(recorded) != {f"code.{stage.name}": code.get(stage.name)}:
        yield "its code changed"
    read, _ = _values(stage, str(observe.INPUTS))
    inputs = json.loads(facts[observe.INPUTS])["inputs"].get(stage.name)
    if read and inputs is not None and flatten(read) != flatten({f"inputs.{stage.name}": inputs}):
        yield f"files of {_FOLDERS[stage.name]} changed"
    for dep in stage.deps:
        if dep.def_path == str(observe.HARDWARE) and dep.hash_info:
            now = hashlib.md5(facts[observe.HARDWARE].encode(), usedforsecurity=False).hexdigest()
            if now != dep.hash_info.value:
                yield "the machine changed"


def _told(stage: Any, kind: str, path: str, change: Any) -> Iterator[str]:
    if not isinstance(change, dict):
        yield f"{kind}{path} {_WORDS.get(change, change)}"
        return
    before, now = _values(stage, path)  # parameters of the file `path`
    for name, how in change.items():
        if how != "modified":
            yield f"{name} {_WORDS.get(how, how)} in {path}"
            continue
        old, new = flatten({name: before.get(name)}), flatten({name: now.get(name)})
        for leaf in sorted(old.keys() | new.keys()):
            if leaf not in old or leaf not in new:
                yield f"{leaf} {'is new' if leaf in new else 'is missing'} in {path}"
            elif old[leaf] != new[leaf]:
                yield f"{leaf}: {old[leaf]!r} -> {new[leaf]!r}"


def _values(stage: Any, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    for dep in stage.deps:
        if hasattr(dep, "read_params") and dep.def_path == path:
            recorded = dep.hash_info.value if dep.hash_info else {}
            return recorded or {}, dep.read_params()
    return {}, {}
