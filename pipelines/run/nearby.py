"""DVC's cache and remote of this checkout, as a place that `qvgen.hub` takes the files of registered models from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING

from qvgen.hub.places import Place
from qvgen.hub.resolve import nearby, project_at
from qvgen.hub.tracking import Registered

if TYPE_CHECKING:
    from pipelines.audit.blobs import Blobs


class DvcStores:
    """What the DVC configuration of the checkout `root` names; read once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.name = f"DVC's cache and remote of {root}"

    @cached_property
    def _blobs(self) -> Blobs:
        from pipelines.audit.blobs import open_blobs

        return ExitStack().enter_context(open_blobs(self._root))

    @contextmanager
    def open(self, model: Registered, path: str) -> Iterator[IO[bytes]]:
        found = self._md5(model, path)
        with self._blobs.open(found) as file:
            if file is None:
                raise FileNotFoundError(f"{found} is not in {self._blobs.where}")
            yield file  # type: ignore[misc]  (a buffered reader)

    def has(self, model: Registered, path: str) -> bool:
        return self._blobs.fault(self._md5(model, path)) is None

    def _md5(self, model: Registered, path: str) -> str:
        if not model.md5:
            raise FileNotFoundError("the version does not say under which hash")
        try:
            found = self._blobs.files(model.md5).get(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{model.md5} is not in {self._blobs.where}") from None
        if found is None:
            raise FileNotFoundError(f"{model.md5} does not list it")
        return found


def places() -> Sequence[Place]:
    """Of the project that the current folder lies in; none outside of one."""
    root = project_at(Path.cwd())
    return [DvcStores(root)] if root is not None and (root / ".dvc").is_dir() else []


def offer() -> None:
    """Let `qvgen.hub` look there. It can be called any number of times."""
    if places not in nearby:
        nearby.append(places)
