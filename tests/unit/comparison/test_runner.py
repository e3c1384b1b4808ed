"""The comparison's runner: order, parallelism, what a failure takes with it; the graph as DVC has it."""

import threading
import time
from pathlib import Path

import pytest

from pipelines.commands.compare import FAST, FILE, REPORT, compare, run_graph
from pipelines.run.dag import read_graph, with_upstream

ROOT = Path(__file__).parents[3]
GRAPH = {"a": set(), "b": {"a"}, "c": {"a"}, "d": {"b", "c"}, "e": set()}


def test_each_stage_runs_once_and_after_what_it_needs() -> None:
    order: list[str] = []

    def run(name: str) -> bool:
        assert set(order) >= GRAPH[name]
        order.append(name)
        return True

    assert run_graph(GRAPH, 1, run) == []
    assert order == ["a", "b", "c", "d", "e"]


def test_as_many_at_a_time_as_asked_for() -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def run(_name: str) -> bool:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        return True

    assert run_graph({str(i): set() for i in range(6)}, 3, run) == []
    assert most == [3]


def test_a_failure_takes_with_it_what_needs_it_and_nothing_else() -> None:
    done: list[str] = []
    failed = run_graph(GRAPH, 2, lambda name: done.append(name) or name != "b")
    assert set(failed) == {"b", "d"}
    assert set(done) == {"a", "b", "c", "e"}


def test_fast_needs_recorded_learning_rates(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"learning_rates\.json is not there"):
        compare(tmp_path, jobs=1, fast=True)


def test_graph_of_the_project() -> None:
    graph = read_graph(ROOT)
    assert graph["qat"] == {"fetch", "prepare", "calibrate"}
    case = f"{FILE}:compare_case@0-W4A4-kd"
    assert graph[case] == {"fetch", "prepare"} | {f"{FILE}:compare_{name}" for name in ("code", "reference", "tuning")}
    assert {f"{FILE}:{name}" for name in FAST} | {REPORT} <= graph.keys()
    # The main pipeline never waits for the comparison.
    assert not any(name.startswith(FILE) for name in with_upstream(graph, {"register"}))
    with pytest.raises(ValueError, match="nothing"):
        with_upstream(graph, {"nothing"})
