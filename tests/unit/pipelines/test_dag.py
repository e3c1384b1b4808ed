"""Order of stages, and which of them must wait so that a stage that measures time runs alone."""

from __future__ import annotations

from pipelines.run.dag import Graph, Plan, in_order, names_of_none, waiting_for_all, with_upstream

GRAPH: Graph = {
    "fetch": set(),
    "baselines": {"fetch"},
    "qat": {"fetch"},
    "pack": {"qat"},
    "benchmark": {"pack"},
    "evaluate": {"pack"},
    "register": {"benchmark", "evaluate"},
}


def test_a_stage_comes_after_what_it_needs() -> None:
    order = in_order(GRAPH)
    assert all(order.index(need) < order.index(name) for name, needs in GRAPH.items() for need in needs)
    assert in_order({"pack": {"qat"}}) == ["pack"]  # what is not in the graph is not run


def test_nothing_runs_beside_a_stage_that_runs_alone() -> None:
    further = waiting_for_all(GRAPH, ["benchmark"])
    assert further == {"benchmark": {"fetch", "baselines", "qat", "evaluate"}}
    whole = {name: needs | further.get(name, set()) for name, needs in GRAPH.items()}
    for other in GRAPH.keys() - {"benchmark"}:
        assert "benchmark" in with_upstream(whole, {other}) or other in with_upstream(whole, {"benchmark"})


def test_two_stages_that_run_alone_do_not_wait_for_each_other() -> None:
    further = waiting_for_all(GRAPH, ["benchmark", "evaluate"])
    whole = {name: needs | further.get(name, set()) for name, needs in GRAPH.items()}
    assert len(in_order(whole)) == len(GRAPH)  # raises on a cycle
    assert ("evaluate" in further["benchmark"]) != ("benchmark" in further["evaluate"])
    assert further["benchmark"] | further["evaluate"] >= {"baselines"}


def test_items_of_a_matrix_are_meant_by_its_name() -> None:
    graph: Graph = {"a": set(), "time@1": set(), "time@2": {"a"}}
    whole = waiting_for_all(graph, ["time"])
    assert whole["time@1"] | whole["time@2"] >= {"a"}


def test_none_is_alone_without_being_named() -> None:
    assert waiting_for_all(GRAPH, []) == {}
    assert waiting_for_all({"a": set()}, ["benchmark"]) == {}


def test_names_that_no_stage_has() -> None:
    plan = Plan({"qat": set(), "time@1": set()}, frozenset(), frozenset(), frozenset({"pack", "comparison/dvc.yaml:compare"}))
    assert names_of_none(plan, ["qat", "time", "time@1", "pack", "comparison/dvc.yaml:compare"]) == []
    assert names_of_none(plan, {"benchmrak": 1, "time@2": 2, "compare": 3}) == ["benchmrak", "compare", "time@2"]
