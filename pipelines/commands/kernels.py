"""`qvgen kernels`: the backends that run packed layers and the ops between them on this machine, and why no faster one
does."""

from __future__ import annotations

import json
from itertools import takewhile
from typing import Any


def report(measure: bool = False) -> dict[str, Any]:
    """{"preference", "isa", "kernels", "measured", "gpus"}: what QVGEN_KERNELS asks for, the instruction sets of the compiled
    kernels, a row per op and backend, and the figures by which `auto` chooses, taken anew with `measure`, and
    what runs on which GPUs. Raises ValueError for an unknown QVGEN_KERNELS."""
    from qvgen.kernels import registry
    from qvgen.kernels.cpu import library

    wanted, measured = registry.preference(), measurement(measure)
    if measure:
        library.isa.cache_clear()  # so that what follows says what the new figures decide
    rows = [row._asdict() for row in registry.explain()]
    isa, gpus = instruction_sets(), architectures()
    return {"preference": wanted.value, "isa": isa, "kernels": rows, "measured": measured, "gpus": gpus}


def architectures() -> list[dict[str, Any]]:
    """What the GPU kernels are made of on each architecture, and why; "here": names of this machine's cards of it."""
    import torch

    from qvgen.kernels.triton.architectures import ARCHITECTURES, of

    here = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    cards = [(of(torch.cuda.get_device_capability(i)), torch.cuda.get_device_name(i)) for i in here]
    return [
        {
            "architecture": entry.name,
            "cards": entry.cards,
            "instruction": entry.instruction,
            "why": entry.why,
            "here": [name for found, name in cards if found is entry],
        }
        for entry in ARCHITECTURES
    ]


def instruction_sets() -> dict[str, Any]:
    """{"used", "supported", "lacking", "refusals"}, best first: "lacking" are those that this build has code for and the
    machine cannot run, "refusals" says more of some of them; without compiled kernels, or with a QVGEN_CPU_ISA that cannot
    run, "used" is None."""
    from qvgen.kernels.cpu import library

    try:
        known = [name.decode() for name in takewhile(lambda name: name is not None, library.load().qvgen_isas())]
        supported = library.supported_isas()
    except library.LibraryMissing:
        return {"used": None, "supported": [], "lacking": [], "refusals": {}}
    try:
        used = library.isa().decode()
    except ValueError:
        used = None
    lacking = [name for name in known if name not in supported]
    return {"used": used, "supported": supported, "lacking": lacking, "refusals": library.refusals()}


def measurement(again: bool) -> dict[str, Any] | None:
    """The figures by which `auto` chooses on this machine (kernels/cpu/choice.py); None without compiled kernels."""
    from qvgen.kernels.cpu import library
    from qvgen.kernels.cpu.choice import choice

    try:
        library.load()
    except library.LibraryMissing:
        return None
    return choice(again)._asdict()


def show(as_json: bool, measure: bool = False) -> None:
    """Print the report as a table and lines on instruction sets and what was measured, or as JSON."""
    content = report(measure)
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
    console.print(gpu_table(content["gpus"]))
    console.print("No GPU was measured yet.", soft_wrap=True)
    console.print(isa_line(content["isa"]), soft_wrap=True)
    if content["measured"]:
        console.print(measured_line(content["measured"]), soft_wrap=True)
    console.print(f"QVGEN_KERNELS={content['preference']}", soft_wrap=True)


def gpu_table(gpus: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="triton, by GPU", title_justify="left")
    for name in ("architecture", "cards", "products by", "why"):
        table.add_column(name, no_wrap=name == "architecture", overflow="fold")
    for gpu in gpus:
        cards = f"{gpu['cards']} (here: {', '.join(gpu['here'])})" if gpu["here"] else gpu["cards"]
        table.add_row(gpu["architecture"], cards, gpu["instruction"], gpu["why"], style="bold" if gpu["here"] else "")
    return table


def isa_line(isa: dict[str, Any]) -> str:
    others = [name for name in isa["supported"] if name != isa["used"]]
    parts = [f"Instruction set in use: {isa['used'] or 'none'}"]
    if others:
        parts.append(f"also here: {', '.join(others)}")
    if isa["lacking"]:
        lacking = [f"{name} ({isa['refusals'][name]})" if name in isa["refusals"] else name for name in isa["lacking"]]
        parts.append(f"not in this machine: {', '.join(lacking)}")
    return "; ".join(parts)


def measured_line(measured: dict[str, Any]) -> str:
    def figures(ms: dict[str, float]) -> str:
        return ", ".join(f"{name} {value:.2f} ms" for name, value in ms.items())

    parts = [f"Measured here: one linear layer {figures(measured['linear_ms'])}"]
    if measured["attention_ms"]:
        parts.append(f"attention {figures(measured['attention_ms'])}")
    parts.append(f"weight-only layer {figures(measured['weight_only_ms'])}")
    parts.append(f"kept in {measured['path']}" if measured["path"] else "not kept: the cache folder cannot be written to")
    return "; ".join(parts)
