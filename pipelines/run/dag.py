"""The graph of all dvc.yaml files of the project, read through DVC. Nothing else knows what depends on what."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from stages.runtime.dvc import open_project, stage_address

Graph = dict[str, set[str]]  # address of a stage -> addresses of the stages that it needs


@dataclass(frozen=True)
class Plan:
    """The stages that a run goes through, and how they stand."""

    graph: Graph
    changed: frozenset[str]  # not up to date by themselves, whatever becomes of the stages they need
    always: frozenset[str]  # of these, those that run every time
    others: frozenset[str]  # stages of the project that it does not go through


def read_graph(root: Path) -> Graph:
    """Every stage, in the order of the files, with those it depends on directly. An address is "stage" or
    "folder/dvc.yaml:stage", as DVC writes it.

    Raises DVC's own errors for a folder that is no project and for a faulty dvc.yaml.
    """
    with open_project(root) as repo:
        return _graph(repo)


def read_plan(root: Path, targets: Iterable[str] = ()) -> Plan:
    """The stages of the root's dvc.yaml, or `targets`, with all that they need. Stages of other files, such as those of a
    comparison, are none of its business. Raises ValueError for a stage that no dvc.yaml has, and DVC's own errors."""
    with open_project(root) as repo, repo.lock:
        mend_rwlock(repo)
        whole = _graph(repo)
        chosen = with_upstream(whole, set(targets) or pipeline_stages(whole))
        stages = {name: stage for stage in stages_of(repo) if (name := stage_address(stage)) in chosen}
        changed = frozenset(name for name, stage in stages.items() if stage.status(check_updates=False))
        always = frozenset(name for name in changed if stages[name].always_changed)
        graph = {name: needs for name, needs in whole.items() if name in chosen}
        return Plan(graph, changed, always, frozenset(whole.keys() - chosen))


def mend_rwlock(repo: Any) -> None:
    """Remove DVC's list of who reads and writes what, if a process was killed while it wrote it: DVC then refuses every later
    run. Whoever is still at work enters and leaves the list under the same lock."""
    from dvc.lock import make_lock
    from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK

    folder = Path(repo.tmp_dir)
    options = {"tmp_dir": str(folder), "hardlink_lock": repo.config["core"].get("hardlink_lock", False)}
    with make_lock(str(folder / RWLOCK_LOCK), **options):
        try:
            json.loads((folder / RWLOCK_FILE).read_bytes())
        except FileNotFoundError:
            return
        except ValueError:
            (folder / RWLOCK_FILE).unlink()


def pipeline_stages(graph: Graph) -> set[str]:
    """The stages of the root's dvc.yaml, which run if no others are named."""
    return {name for name in graph if ":" not in name}


def _graph(repo: Any) -> Graph:
    graph = repo.index.graph
    # In the order of the files: the graph's own differs from run to run.
    return {
        stage_address(s): {stage_address(up) for up in graph.successors(s) if not up.is_data_source}
        for s in stages_of(repo)
        if s in graph
    }


def stages_of(repo: Any) -> list[Any]:
    """Those that run something, in the order of the files: .dvc files, which `dvc add` writes, are data."""
    return [stage for stage in repo.index.stages if not stage.is_data_source]


def in_order(graph: Graph) -> list[str]:
    """The stages, each after those it needs."""
    return list(TopologicalSorter({name: sorted(needs & graph.keys()) for name, needs in graph.items()}).static_order())


def waiting_for_all(graph: Graph, alone: Iterable[str]) -> Graph:
    """What else each stage of `alone` has to wait for so that no other stage runs beside it: all that does not need it.

    An item of a matrix stage is meant by the name of its stage too.
    """
    names, edges, further = set(alone), {name: set(needs) for name, needs in graph.items()}, Graph()
    for name in in_order(graph):
        if {name, name.partition("@")[0]} & names:
            after = {other for other in graph if name in with_upstream(edges, {other})}
            further[name] = graph.keys() - after - graph[name]
            edges[name] |= further[name]
    return further


def names_of_none(plan: Plan, names: Iterable[str]) -> list[str]:
    """Those of `names` that no stage of the project has, with or without its item."""
    known = {*plan.graph, *plan.others}
    return sorted(set(names) - known - {name.partition("@")[0] for name in known})


def with_upstream(graph: Graph, wanted: set[str]) -> set[str]:
    """`wanted` and everything that it needs. Raises ValueError for a stage that the graph does not have."""
    if unknown := sorted(wanted - graph.keys()):
        raise ValueError(f"no dvc.yaml has a stage {unknown[0]!r}")
    found: set[str] = set()
    open_ = set(wanted)
    while open_:
        found |= open_
        open_ = set().union(*(graph[name] for name in open_)) - found
    return found
