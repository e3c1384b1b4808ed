"""What runs say of the machine that computed them, and what the audit makes of it."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.audit.lineage import Step
from pipelines.audit.machine import difference, machine_check, variables
from stages.record.journal import Journal, read_events
from stages.runtime import machine
from stages.runtime.machine import INSTRUCTIONS, PROCESSOR, THREADS, computed_on

HERE = {PROCESSOR: machine.processor(), INSTRUCTIONS: machine.instructions()}
OTHER = {PROCESSOR: "Another Processor 9000", INSTRUCTIONS: "avx2 fma"}


def step(stage: str, tags: dict[str, str]) -> Step:
    return Step(
        id=stage, stage=stage, status="FINISHED", deleted=False, started=1, ended=2, parent=None, commit=None, dirty=False,
        deps={}, outs={}, params={}, tags=tags, metrics=frozenset(), datasets={}, cached=False,
    )  # fmt: skip


def lineage(**tags: dict[str, str]) -> Any:
    return SimpleNamespace(steps=[step(name, given) for name, given in tags.items()])


def test_a_run_records_threads_processor_and_instructions(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert computed_on() == HERE | {THREADS: str(torch.get_num_threads())}
    for status, computed, wanted in (("FINISHED", True, 1), ("FINISHED", False, 0), ("FAILED", True, 0)):
        journal = Journal.create(tmp_path, "a", "pipeline-1", tags={}, params={})
        journal.end(status, computed)  # type: ignore[arg-type]
        events, _ = read_events(journal.path)
        assert [event["tags"] for event in events if event["event"] == "tags"] == [computed_on()] * wanted
    monkeypatch.delitem(sys.modules, "torch")
    assert computed_on() == HERE, "bytes of a stage without torch do not depend on threads"


def test_instructions_are_those_that_kernels_are_chosen_by(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [("model name", "A 1"), ("flags", "fpu avx2 fma avx512f smap"), ("model name", "A 1"), ("flags", "fpu avx2")]
    monkeypatch.setattr(machine, "_cpuinfo", lambda: told)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert machine.instructions() == "avx2 fma avx512f ATEN_CPU_CAPABILITY=avx2"
    assert machine.processor() == "A 1"
    monkeypatch.setattr(machine, "_cpuinfo", lambda: [])  # another operating system
    assert machine.processor() and machine.instructions()


def test_the_same_machine() -> None:
    found = lineage(pack=HERE | {THREADS: "2"}, qat=HERE | {THREADS: "2"}, fetch=HERE)
    check = machine_check(found)
    assert check.ok and check.detail.endswith("threads: 2; this machine is of the same kind"), check.detail
    assert variables(found) == {"OMP_NUM_THREADS": "2"}, "a rebuild takes as many"


def test_another_machine() -> None:
    check = machine_check(lineage(pack=OTHER | {THREADS: "16"}))
    assert check.ok and check.detail.startswith("Another Processor 9000 (avx2 fma), threads: 16; here it is ")
    assert check.detail.endswith("a rebuild may give other bytes")
    both = machine_check(lineage(pack=OTHER | {THREADS: "16"}, qat=HERE | {THREADS: "2"}))
    assert "pack on Another Processor 9000" in both.detail and "threads: 16 (pack), 2 (qat)" in both.detail


def test_runs_with_different_threads_cannot_be_rebuilt_in_one_go() -> None:
    found = lineage(pack=HERE | {THREADS: "1"}, qat=HERE | {THREADS: "2"})
    assert variables(found) == {}
    assert difference(found) == "the runs had 1 and 2 threads, a rebuild has one number for all"


def test_runs_from_before_say_so() -> None:
    check = machine_check(lineage(pack={}, qat={}))
    assert check.ok and check.detail == "not recorded: whether a rebuild gives the same bytes here is open"
    assert difference(lineage(pack={})) == "processor and number of threads were not recorded"
    assert "(not recorded by qat)" in machine_check(lineage(pack=HERE, qat={})).detail


def test_a_changed_record_reaches_no_command() -> None:
    assert variables(lineage(pack=HERE | {THREADS: "2; rm -rf ~"})) == {}
