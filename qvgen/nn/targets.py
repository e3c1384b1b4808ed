"""Which layers a scheme means: patterns of `targets` and `ignore` resolved to names of linear layers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import regex
from torch import nn

_REGEX = "re:"
_SECONDS = 2.0  # for one pattern and one name; those that are meant to match take microseconds


def match_linears(
    model: nn.Module, targets: Sequence[str], ignore: Sequence[str] = (), default_targets: Sequence[str] = ()
) -> list[str]:
    """Full names of the linear layers (nn.Linear and subclasses) selected by `targets` minus `ignore`, in model order.

    A pattern is a class name ("Linear", subclasses included), a full name, or "re:" and a regular expression matched from
    the start of the full name; one that reaches linear layers only among other modules selects those. Empty `targets`
    means `default_targets`, and every linear layer if that is empty too. A layer that stands in several places is one: any of
    its names selects or ignores it, and the first one is returned. Raises ValueError for a pattern that matches no linear
    layer, for an invalid regular expression or one that takes seconds, and when nothing is left.
    """
    modules = model.named_modules(remove_duplicate=False)
    linears = {name: module for name, module in modules if isinstance(module, nn.Linear)}
    if not linears:
        raise ValueError(f"{type(model).__name__} has no linear layers to quantize")
    selected: set[nn.Linear] = set()
    for pattern in targets or default_targets or ("Linear",):
        selected |= {linears[name] for name in _matches(pattern, "targets", linears)}
    for pattern in ignore:
        selected -= {linears[name] for name in _matches(pattern, "ignore", linears)}
    if not selected:
        raise ValueError(
            f"nothing left to quantize: ignore {list(ignore)} removes every layer that targets "
            f"{list(targets or default_targets)} selects; narrow ignore"
        )
    first = {module: name for name, module in reversed(linears.items())}
    return [name for name, module in linears.items() if module in selected and first[module] == name]


def replace_module(model: nn.Module, fqn: str, new: nn.Module) -> None:
    """Put `new` wherever the submodule `fqn` is: all its places share it. Raises AttributeError if there is none."""
    if not fqn:
        raise ValueError("the model itself cannot be replaced; name one of its submodules")
    old = model.get_submodule(fqn)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


def _matches(pattern: str, where: str, linears: dict[str, nn.Linear]) -> set[str]:
    if pattern.startswith(_REGEX):
        found = _matched(pattern, where, linears)
    elif pattern in linears:
        found = {pattern}
    else:
        found = {name for name, module in linears.items() if pattern in _class_names(module)}
    if not found:
        raise ValueError(f"{where}: {pattern!r} matches no linear layer{_hint(pattern, linears)}")
    return found


def _matched(pattern: str, where: str, names: Iterable[str]) -> set[str]:
    """Some expressions take exponential time, such as (a+)+$, and a config.json of others may hold one."""
    try:
        compiled = regex.compile(pattern.removeprefix(_REGEX))
        return {name for name in names if compiled.match(name, timeout=_SECONDS)}
    except (regex.error, RecursionError) as error:
        raise ValueError(f"{where}: {pattern!r} is not a regular expression: {error}") from error
    except TimeoutError:
        raise ValueError(f"{where}: matching {pattern!r} takes more than {_SECONDS:g} s: use no nested repetitions") from None


def _class_names(module: nn.Module) -> set[str]:
    return {c.__name__ for c in type(module).__mro__ if issubclass(c, nn.Linear)}


def _hint(pattern: str, linears: dict[str, nn.Linear]) -> str:
    classes = set().union(*map(_class_names, linears.values()))
    bare = pattern.removeprefix(_REGEX).replace("\\", "")
    if contains := [name for name in linears if bare in name]:
        remedy = "write the whole name" if not pattern.startswith(_REGEX) else "a pattern starts at the beginning of it"
        return f"; close: {', '.join(contains[:3])} ({remedy})"
    close = difflib.get_close_matches(bare, [*linears, *sorted(classes)], n=3, cutoff=0.5) or list(linears)[:3]
    return f"; close: {', '.join(close)}"
