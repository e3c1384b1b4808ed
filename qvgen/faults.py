"""What is wrong with a tree of parameters, in words."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel, ValidationError

_SHOWN = 100  # characters of a value in a message
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def explain(source: str | Path, error: ValidationError, model: type[BaseModel]) -> str:
    """A line for each fault that `model` found in `source`: its path, the value found, and what is allowed."""
    lines = [f"{source}: {error.error_count()} fault(s)"]
    for fault in error.errors():
        where = ".".join(map(str, fault["loc"])) or "(whole file)"
        message = fault["msg"].removeprefix("Value error, ")
        shown = "" if isinstance(fault["input"], dict) else f" = {fault['input']!r:.{_SHOWN}}"
        if fault["type"] == "extra_forbidden":
            allowed = ", ".join(_known_keys(model, fault["loc"][:-1]))
            message = f"unknown key; allowed here: {allowed}"
        elif fault["type"] == "float_type" and _EXPONENT.fullmatch(str(fault["input"])):
            message = "is text in YAML; write an exponent with a point and a sign, such as 5.0e-4"
        elif fault["type"] == "missing":
            shown, message = "", "is missing"
        lines.append(f"  {where}{shown}: {message}")
    return "\n".join(lines)


def _known_keys(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """Keys of the section at `location`, by walking the declared types."""
    for part in location:
        for name, info in model.model_fields.items():
            if part in (name, info.alias):
                kinds = [info.annotation, *getattr(info.annotation, "__args__", ())]
                model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), model)
    return [info.alias or name for name, info in model.model_fields.items()]
