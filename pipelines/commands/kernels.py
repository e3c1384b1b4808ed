"""`qvgen kernels`: what runs the packed layers and the ops between them on this machine, and why nothing faster does."""

from __future__ import annotations

import json
from itertools import takewhile
from typing import Any


def report() -> dict[str, Any]:
    """{"preference", "isa", "kernels"}: what QVGEN_KERNELS asks for, the instruction sets of the compiled kernels, and a row
    per op and backend. Raises ValueError for an unknown QVGEN_KERNELS."""
    from qvgen.kernels import registry

    wanted = registry.preference()
    rows = registry.explain()
    return {"preference": wanted.value, "isa": instruction_sets(), "kernels": [row._asdict() for row in rows]}


def instruction_sets() -> dict[str, Any]:
    """{"used", "supported", "lacking"}, best first: "lacking" are those that this build has code for and the machine cannot
    run; without compiled kernels, or with a QVGEN_CPU_ISA that cannot run, "used" is None."""
    from qvgen.kernels.cpu import library

    try:
        known = [name.decode() for name in takewhile(lambda name: name is not None, library.load().qvgen_isas())]
        supported = library.supported_isas()
    except library.LibraryMissing:
        return {"used": None, "supported": [], "lacking": []}
    try:
        used = library.isa().decode()
    except ValueError:
        used = None
    return {"used": used, "supported": supported, "lacking": [name for name in known if name not in supported]}


def show(as_json: bool) -> None:
    """Print the report as a table and a line on instruction sets, or as JSON."""
    content = report()
    if as_json:
        print(json.dumps(content, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("op", "backend", "available", "chosen", "reason"):
        table.add_column(name, no_wrap=name != "reason", overflow="fold")
    said: set[str] = set()
    for row in content["kernels"]:
        reason = "as above" if row["reason"] in said else row["reason"]
        said |= {row["reason"]} - {""}
        yes_or_no = ["yes" if row[name] else "no" for name in ("available", "chosen")]
        table.add_row(row["op"], row["backend"], *yes_or_no, reason, style="bold" if row["chosen"] else "")
    console = Console(highlight=False)
    console.print(table)
    console.print(isa_line(content["isa"]), soft_wrap=True)
    console.print(f"QVGEN_KERNELS={content['preference']}", soft_wrap=True)


def isa_line(isa: dict[str, Any]) -> str:
    others = [name for name in isa["supported"] if name != isa["used"]]
    parts = [f"Instruction set in use: {isa['used'] or 'none'}"]
    if others:
        parts.append(f"also here: {', '.join(others)}")
    if isa["lacking"]:
        parts.append(f"not in this machine: {', '.join(isa['lacking'])}")
    return "; ".join(parts)
