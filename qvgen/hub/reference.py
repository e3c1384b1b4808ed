"""Names of models: `models:/NAME@ALIAS` and `models:/NAME/VERSION` of MLflow's registry, `ORG/NAME@COMMIT` of Hugging Face."""

from __future__ import annotations

import re
from dataclasses import dataclass

_MODELS = "models:/"
_FORMS = "models:/NAME@ALIAS, such as models:/qvgen@champion, or models:/NAME/VERSION"


@dataclass(frozen=True)
class Reference:
    """A version in MLflow's registry: by number, or by an alias, which may move."""

    name: str
    alias: str | None = None
    version: int | None = None

    def __str__(self) -> str:
        return f"{_MODELS}{self.name}" + (f"/{self.version}" if self.alias is None else f"@{self.alias}")


@dataclass(frozen=True)
class HubId:
    """A repository of Hugging Face at a commit, which cannot move."""

    repository: str
    commit: str


def is_registered(text: str) -> bool:
    """Whether a text means a model of the registry, well formed or not."""
    return text.startswith(_MODELS)


def parse_reference(text: str) -> Reference:
    """Raises ValueError for anything else than the two forms."""
    rest = text.removeprefix(_MODELS).lstrip("/")
    if text.startswith(_MODELS):
        if match := re.fullmatch(r"([\w.-]+)@([\w.-]+)", rest, re.ASCII):
            return Reference(match[1], alias=match[2])
        if match := re.fullmatch(r"([\w.-]+)/v?(\d{1,9})", rest, re.ASCII):
            return Reference(match[1], version=int(match[2]))
    raise ValueError(f"{text!r:.200} names no model version: give {_FORMS}")


def parse_hub_id(text: str) -> HubId | None:
    """None for what is no hub id. Raises ValueError for one without the commit: a branch or tag may move."""
    match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@(.*))?", text, re.ASCII)
    if match is None or match[2] is None:
        return None
    if not re.fullmatch(r"[0-9a-f]{40}", match[2]):
        raise ValueError(f"{text!r:.200}: after @ stands the commit to use, 40 hex digits; a branch or tag may move")
    return HubId(match[1], match[2])
