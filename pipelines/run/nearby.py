"""DVC's cache and remote of this checkout, as a place that `qvgen.hub` takes the files of registered models from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from qvgen.hub.places import Place
from qvgen.hub.resolve import nearby, project_at
from qvgen.hub.tracking import Registered


class DvcStores:
    """What the DVC configuration of the checkout `root` names."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.name = f"DVC's cache and remote of {root}"

    @contextmanager
    def open(self, model: Registered, path: str) -> Iterator[IO[bytes]]:
        from pipelines.audit.blobs import open_blobs

        if not model.md5:
            raise FileNotFoundError("the version does not say under which hash")
        with open_blobs(self._root) as blobs:
            found = blobs.files(model.md5).get(path)
            if found is None:
                raise FileNotFoundError(f"{model.md5} does not list it")
            with blobs.open(found) as file:
                if file is None:
                    raise FileNotFoundError(f"{found} is not in {blobs.where}")
                yield file  # type: ignore[misc]  (a buffered reader)


def places() -> Sequence[Place]:
    """Of the project that the current folder lies in; none outside of one."""
    root = project_at(Path.cwd())
    return [DvcStores(root)] if root is not None and (root / ".dvc").is_dir() else []


def offer() -> None:
    """Let `qvgen.hub` look there. It can be called any number of times."""
    if places not in nearby:
        nearby.append(places)
