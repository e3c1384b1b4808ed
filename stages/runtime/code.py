"""A fingerprint of the code that each stage can reach, blind to what cannot change a result.

DVC's own dependency on a file sees a reworded docstring as a new stage, and a stage takes minutes. Here a stage's code is the
modules that its script imports, directly or not, and the C++ sources of the kernels among them; stages/runtime/source.py
says what of a file counts.

It errs on the side of running again: any other change of a reachable module counts, whether or not it changes a number. A
false alarm costs minutes, a stale result costs trust. That is why it is not the behaviour fingerprint of comparison/, which
holds a result to be good until a measurable output of its method moves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from pathlib import PurePosixPath

from stages.runtime.source import BUILD, NATIVE, PACKAGES, PARAMS, Source, is_code, module_of, sha256

# Modules that no stage depends on, and why. A trailing dot means the whole package. Of PARAMS counts what it computes, for
# stages that ask for it: a new section must not retrain a model.
EXCLUDED = {
    "stages.record.": "writes and sends the record of a run, after the numbers are made",
    "stages.runtime.dvc": "reads what DVC knows of the running stage",
    "stages.runtime.code": "computes these fingerprints",
    "stages.runtime.source": "computes these fingerprints",
    "stages.runtime.usage": "tells what a stage used, after the numbers are made",
    "stages.runtime.inputs": "describes folders that params.yaml names, for stage observe alone",
}
# Imported by these stages, but not run: package -> stages and reason.
NOT_RUN = {
    "qvgen.kernels.": (("calibrate", "qat", "decay"), "training computes in PyTorch; stage pack makes the first packed layer"),
    "qvgen.integrations.": (
        ("fetch", "prepare", "calibrate", "qat", "decay"),
        "loads packed folders, and these stages read full-precision ones",
    ),
}


def code_fingerprints(read: Callable[[str], Source], paths: Collection[str], stages: Iterable[str]) -> dict[str, str]:
    """Stage -> sha256 of the code that stages/<stage>.py can reach.

    `paths`: files of the project, relative to it, with forward slashes; `read` gives the content of one of them.
    """
    tree = _Tree(read, paths)
    return {stage: tree.fingerprint(f"stages.{stage}") for stage in stages}


def reachable(read: Callable[[str], Source], paths: Collection[str], stage: str) -> set[str]:
    """Paths of the files in a stage's fingerprint."""
    tree = _Tree(read, paths)
    found = tree.closure(f"stages.{stage}")
    return {tree.modules[module] for module in found} | set(tree.native(found))


class _Tree:
    """The project's modules, and which imports which."""

    def __init__(self, read: Callable[[str], Source], paths: Collection[str]) -> None:
        self.read = cache(read)
        self.modules = {module_of(path): path for path in paths if path.endswith(".py") and is_code(path)}
        self._native = [path for path in paths if path.endswith(NATIVE) and is_code(path)]
        self._build = [path for path in paths if path == BUILD]

    def fingerprint(self, root: str) -> str:
        found = self.closure(root)
        parts = sorted(
            sha256([source.body, sorted(self._named(module))])
            for module in found
            if (source := self._source(module)) is not None
        )
        return sha256([parts, sorted(self.read(path).body for path in self.native(found))])

    def closure(self, root: str) -> set[str]:
        """Modules that run when `root` does."""
        found: set[str] = set()
        todo = {root}
        while todo:
            module = todo.pop()
            if module not in found and module in self.modules and not (_excluded(module) or _not_run(module, root)):
                found.add(module)
                todo |= set(self._reached(module)) | set(self._run_by_packages(module))
        return found

    def native(self, found: Collection[str]) -> Iterator[str]:
        """C++ sources below the folders of those modules, and how they are compiled."""
        folders = {f"{PurePosixPath(self.modules[module]).parent}/" for module in found} - {f"{name}/" for name in PACKAGES}
        named = [path for path in self._native if any(path.startswith(folder) for folder in folders)]
        yield from named + (self._build if named else [])

    def _source(self, module: str) -> Source | None:
        return self.read(self.modules[module]) if module in self.modules else None

    def _reached(self, module: str) -> Iterator[str]:
        source = self._source(module)
        assert source is not None
        for target, name, _ in source.imports:
            if (resolved := self._resolve(target, name)) is not None and resolved != PARAMS:
                yield resolved
        params = self._source(PARAMS)
        if params is not None and set(source.asks) & set(params.computes):
            yield PARAMS
        for mention in source.mentions:
            yield from self._mentioned(mention)

    def _run_by_packages(self, module: str) -> Iterator[str]:
        """The packages around a module run before it. Names that they only hand on from elsewhere are not reached thereby;
        modules that they import as such are, since that is how something gets registered."""
        parts = module.split(".")
        for i in range(1, len(parts)):
            package = ".".join(parts[:i])
            if package in self.modules and not _excluded(package):
                source = self.read(self.modules[package])
                for target, name, _ in source.imports:
                    whole = target if not name else f"{target}.{name}"
                    if whole in self.modules:
                        yield whole

    def _named(self, module: str) -> Iterator[list[str]]:
        """The imports of a module, each target by its content: it may move, but not become another one."""
        source = self._source(module)
        assert source is not None
        for target, name, alias in source.imports:
            resolved = self._resolve(target, name)
            yield [self._content(resolved) if resolved else target, name, alias]
        for mention in source.mentions:
            found = list(self._mentioned(mention))
            yield ["text", *(sorted(map(self._content, found)) or [mention])]

    def _content(self, module: str) -> str:
        source = None if _excluded(module) or module == PARAMS else self._source(module)
        return source.body if source else "excluded"

    def _resolve(self, module: str, name: str, seen: frozenset[str] = frozenset()) -> str | None:
        """The module that a name comes from: what a package only hands on comes from where the package has it from."""
        if not name or f"{module}.{name}" in self.modules:
            found = f"{module}.{name}".rstrip(".")
            return found if found in self.modules else None
        source = self._source(module)
        if source is not None and module not in seen and self.modules[module].endswith("/__init__.py"):
            for target, original, alias in source.imports:
                if original and (alias or original) == name:
                    return self._resolve(target, original, seen | {module})
        return module if module in self.modules else None

    def _mentioned(self, text: str) -> list[str]:
        if text.endswith("."):  # the beginning of a name that is put together
            return sorted(module for module in self.modules if module.startswith(text))
        return [text] if text in self.modules else []


def _excluded(module: str) -> bool:
    return any(_within(module, name) for name in EXCLUDED)


def _not_run(module: str, root: str) -> bool:
    stage = root.removeprefix("stages.")
    return any(_within(module, name) and stage in stages for name, (stages, _) in NOT_RUN.items())


def _within(module: str, name: str) -> bool:
    return module == name or (name.endswith(".") and f"{module}.".startswith(name))
