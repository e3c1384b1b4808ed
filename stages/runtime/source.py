"""The part of a source file that can change a result: the syntax tree of Python, the text of C++ without comments and layout.

Docstrings, comments, annotations of plain functions and the place of the file do not count. No import of another module of
the project: the stage that needs this runs at every `dvc repro` and has to be quick.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ast

PACKAGES = ("qvgen", "stages")
NATIVE = (".cpp", ".cc", ".cu", ".c", ".h", ".hpp", ".cuh")  # they belong to the modules of the folder above them
BUILD = "CMakeLists.txt"  # how NATIVE is compiled
PARAMS = "qvgen.params"  # declares the parameters; DVC tracks their values, one by one
DECLARATIONS = (PARAMS, "qvgen.gate")
_MODULE = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+\.?")


@dataclass(frozen=True)
class Source:
    """Summary of one file. `body` is a hash; an import is (module, name or "", alias or "")."""

    body: str
    imports: tuple[tuple[str, str, str], ...] = ()
    mentions: tuple[str, ...] = ()  # texts that look like modules, as `python -m` and import_module take them
    asks: tuple[str, ...] = ()  # attributes of something called `params`
    computes: tuple[str, ...] = ()  # of PARAMS alone: the attributes that it computes, which no value in params.yaml shows


def is_code(path: str) -> bool:
    """Whether a path, relative to the project, can be part of a fingerprint."""
    return path == BUILD or (path.split("/")[0] in PACKAGES and path.endswith((".py", *NATIVE)))


def summarize(path: str, content: bytes) -> Source:
    """Summary of a file. Of Python that does not parse the plain text counts."""
    if path.endswith(".py"):
        try:
            return _summarize_python(content, module_of(path), path.endswith("/__init__.py"))
        except (SyntaxError, ValueError):
            return Source(hashlib.sha256(content).hexdigest())
    text = content.decode(errors="replace")
    without = re.sub(r"#.*", "", text) if path == BUILD else _without_comments(text)
    return Source(sha256(_squeezed(without)))


_CPP = re.compile(
    r'R"(?P<end>[^(\s]*)\(.*?\)(?P=end)"|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'|//[^\n]*|/\*.*?\*/', re.DOTALL
)


def _without_comments(text: str) -> str:
    return _CPP.sub(lambda match: " " if match[0].startswith("/") else match[0], text.replace("\\\n", " "))


def _squeezed(text: str) -> list[str]:
    """Lines of the preprocessor by themselves, all else in one; blanks only where they part two words."""
    lines, run = [], []
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            lines += [" ".join(run), " ".join(line.split())]
            run = []
        else:
            run.append(line)
    return [re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", line) for line in [*lines, " ".join(run)] if line.strip()]


def _parsed(content: bytes) -> ast.Module:
    """The syntax tree. Python 3.11 counts the depth of all threads together while it builds one and may then complain of the
    sum (CPython issue 106905), beside Prefect's threads once in some hundred flows. Nothing is wrong with the file: again."""
    import ast

    for _ in range(10):
        try:
            return ast.parse(content)
        except SystemError:
            time.sleep(0.01)
    return ast.parse(content)


def _summarize_python(content: bytes, module: str, package: bool) -> Source:
    import ast

    tree = _parsed(content)
    computes = _keep_functions(tree) if module in DECLARATIONS else ()
    _strip(tree)
    imports: set[tuple[str, str, str]] = set()
    foreign: set[str] = set()
    mentions: set[str] = set()
    asks: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                _add(imports, foreign, alias.name, "", alias.asname or "")
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            for alias in node.names:
                _add(imports, foreign, _absolute(node, module, package), alias.name, alias.asname or "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _MODULE.fullmatch(node.value):
            mentions.add(node.value)
            node.value = "<module>"  # `mentions` says which
        elif isinstance(node, ast.Attribute) and "params" in (getattr(node.value, "attr", ""), getattr(node.value, "id", "")):
            asks.add(node.attr)
    body = sha256([list(_plain(tree)), sorted(foreign)])
    return Source(body, tuple(sorted(imports)), tuple(sorted(mentions)), tuple(sorted(asks)), computes)


def _keep_functions(tree: ast.Module) -> tuple[str, ...]:
    """Reduce classes to the methods that other files may call, and return these methods' names."""
    import ast

    kept: list[ast.FunctionDef] = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            kept += [part for part in node.body if isinstance(part, ast.FunctionDef) and not part.name.startswith("_")]
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    tree.body = [*imports, *kept]
    return tuple(function.name for function in kept)


def _add(imports: set[tuple[str, str, str]], foreign: set[str], module: str, name: str, alias: str) -> None:
    if module.split(".")[0] in PACKAGES:
        imports.add((module, name, alias))
    else:
        foreign.add(f"{module}:{name}:{alias}")


def _absolute(node: ast.ImportFrom, module: str, package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + package]
    return ".".join([*base, *([node.module] if node.module else [])])


def _strip(tree: ast.AST) -> None:
    """Remove, in place, parts that change no result: docstrings and other texts that stand alone, annotations, blocks for
    type checkers. Annotations stay in classes, where they make fields, and on decorated functions: the decorator may read
    them."""
    import ast

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.decorator_list:
            node.returns = None
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                fields = isinstance(node, ast.ClassDef)
                setattr(node, field, [new for old in statements if (new := _kept(old, fields)) is not None])


def _kept(node: ast.AST, fields: bool) -> ast.AST | None:
    import ast

    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return None
    if isinstance(node, ast.If) and ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING" and not node.orelse:
        return None
    if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
        return None
    if isinstance(node, ast.AnnAssign) and not fields:
        return ast.Assign([node.target], node.value) if node.value is not None else None
    return node


def _plain(node: object) -> Iterator[object]:
    """A syntax tree as nested lists, without imports, and without empty fields, which differ between versions of Python."""
    import ast

    if isinstance(node, ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.AST):
        yield type(node).__name__
        for name, value in ast.iter_fields(node):
            if name not in ("ctx", "kind", "type_comment", "type_ignores") and value not in (None, []):
                yield [name, *_plain(value)]
        if isinstance(node, ast.Constant) and node.value is None:
            yield "None"
    elif isinstance(node, list):
        for item in node:
            if part := list(_plain(item)):
                yield part
    else:
        yield f"{type(node).__name__}:{node!r}"


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
