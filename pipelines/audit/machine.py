"""The check of `qvgen audit` that says what a model was computed on: another processor or another number of threads may give
other bytes from the same code, data and parameters."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.audit.checks import Check
from pipelines.audit.lineage import Lineage, Step
from stages.runtime.machine import INSTRUCTIONS, PROCESSOR, THREADS, instructions, processor

_THREADS = "OMP_NUM_THREADS"


def machine_check(lineage: Lineage) -> Check:
    """What the runs recorded, and whether this machine is such a one. It never fails: a model may be audited anywhere."""
    machines = _machines(lineage)
    if not machines:
        return Check("machine", "PASS", f"not recorded: whether a rebuild gives the same bytes here is open{_silent(lineage)}")
    told = "; ".join(
        f"{', '.join(stages)} on {name} ({features})" if len(machines) > 1 else f"{name} ({features})"
        for (name, features), stages in machines.items()
    )
    return Check("machine", "PASS", f"{told}, {_threads_told(lineage)}{_silent(lineage)}; {_compared(machines)}")


def variables(lineage: Lineage) -> dict[str, str]:
    """Environment of a rebuild: the number of threads that the runs computed with, if they all had the same."""
    threads = _threads(lineage)
    number = next(iter(threads), "")
    return {_THREADS: number} if len(threads) == 1 and number.isdecimal() else {}  # it ends in a command that people copy


def difference(lineage: Lineage) -> str:
    """What may make a rebuild differ here, as far as the record says."""
    machines, threads = _machines(lineage), _threads(lineage)
    if not machines:
        return "processor and number of threads were not recorded"
    if len(threads) > 1:
        return f"the runs had {' and '.join(sorted(threads))} threads, a rebuild has one number for all"
    return _compared(machines)


def _machines(lineage: Lineage) -> dict[tuple[str, str], list[str]]:
    """(processor, instruction sets) -> stages."""
    found: dict[tuple[str, str], list[str]] = {}
    for step in lineage.steps:
        if PROCESSOR in step.tags:
            found.setdefault((step.tags[PROCESSOR], step.tags.get(INSTRUCTIONS, "")), []).append(step.stage)
    return found


def _threads(lineage: Lineage) -> Mapping[str, list[str]]:
    """Number of threads -> stages; those that compute nothing with torch have none."""
    found: dict[str, list[str]] = {}
    for step in lineage.steps:
        if THREADS in step.tags:
            found.setdefault(step.tags[THREADS], []).append(step.stage)
    return found


def _threads_told(lineage: Lineage) -> str:
    threads = _threads(lineage)
    if not threads:
        return "nothing computed with torch"
    if len(threads) == 1:
        return f"threads: {next(iter(threads))}"
    return "threads: " + ", ".join(f"{number} ({', '.join(stages)})" for number, stages in sorted(threads.items()))


def _silent(lineage: Lineage) -> str:
    silent = [step.stage for step in lineage.steps if not _says(step)]
    return f" (not recorded by {', '.join(silent)})" if silent and len(silent) < len(lineage.steps) else ""


def _says(step: Step) -> bool:
    return PROCESSOR in step.tags


def _compared(machines: Mapping[tuple[str, str], object]) -> str:
    here = (processor(), instructions())
    if machines.keys() == {here}:
        return "this machine is of the same kind"
    return f"here it is {here[0]} ({here[1]}): a rebuild may give other bytes"
