"""Faces of packages that import a name when it is used: `import qvgen` must load neither torch nor diffusers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy(homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__` that imports a name from its module, `homes[name]`, when it is first asked for."""

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"no name {name!r} here; there are {', '.join(sorted(homes))}")
        return getattr(importlib.import_module(homes[name]), name)

    return get
