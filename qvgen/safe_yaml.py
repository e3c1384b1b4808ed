"""YAML of people who may mean harm: plain data, each key once, and no more of it than a configuration needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

LONGEST_TEXT, MOST_NODES = 1_000_000, 10_000  # params.yaml has some 200 values in 5,000 characters
_OCTAL_OR_SIXTIES = re.compile(r"[-+]?0[0-7_]+|.*:.*")


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which plain YAML silently keeps the last, and one that is no text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a list or mapping is no key", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _number(loader: _UniqueKeys, node: yaml.ScalarNode) -> int | float:
    """A number that is the same in YAML 1.1 and in 1.2, which DVC reads: else the record would have another than the run."""
    if _OCTAL_OR_SIXTIES.fullmatch(node.value):
        why = f"{node.value} is octal or counts in sixties here, and something else for DVC: write it in decimal digits"
        raise yaml.constructor.ConstructorError(None, None, why, node.start_mark)
    return loader.construct_yaml_float(node) if node.tag.endswith("float") else loader.construct_yaml_int(node)


for _tag in ("int", "float"):
    _UniqueKeys.add_constructor(f"tag:yaml.org,2002:{_tag}", _number)


def read_yaml(path: Path) -> Any:
    """The content of a file. Raises ValueError, naming it, for what is no UTF-8, no YAML, or too large."""
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    except RecursionError:
        raise ValueError(f"{path} nests brackets too deeply for a configuration") from None
    # The last four: PyYAML's, for values such as `!!int x`, `!!bool 7` and 2001-99-99.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None


def _parse(text: str) -> Any:
    """The content. Raises ValueError if there is too much of it, aliases counted as often as they are used."""
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"{len(text)} characters, more than {LONGEST_TEXT}")
    loader = _UniqueKeys(text)
    try:
        root = loader.get_single_node()
        pending: list[Any] = [root]
        for _ in range(MOST_NODES):
            if not pending:
                break
            node = pending.pop()
            if isinstance(node, yaml.SequenceNode):
                pending += node.value
            elif isinstance(node, yaml.MappingNode):
                pending += [part for pair in node.value for part in pair]
        if pending:
            raise ValueError(f"more than {MOST_NODES} values; an alias counts as often as it is used")
        return None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()
