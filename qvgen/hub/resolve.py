"""From the name of a model to a folder with its files, checked by hash.

    folder = model_folder("models:/qvgen@champion")     # or models:/qvgen/3, or ORG/NAME@COMMIT, or a folder

A version of MLflow's registry is taken from the nearest place that has its bytes: the packed folder of the project at hand,
the user's cache, DVC's cache and remote of the project (`nearby`), the DVC remote that the version names, MLflow itself.
"""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from qvgen.hub.places import Artifacts, DvcRemote, Place
from qvgen.hub.reference import Reference, is_registered, parse_hub_id, parse_reference
from qvgen.hub.store import copy_checked, faults_of, keep, recall, remember
from qvgen.hub.tracking import Registered, UnreachableError, find_tracking, open_client, read_version

PACKED = Path("artifacts/packed")  # in a project
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
nearby: list[Callable[[], Sequence[Place]]] = []  # more places, of a program that knows some: `qvgen` in a project knows DVC


def model_folder(text: str | Path) -> Path:
    """The folder of a model that is named by its folder, as a version of the registry, or as a hub id with its commit. Any
    other text is taken for a folder, which may not exist.

    Raises ValueError for a reference that is malformed or not registered, and for files that no place has, naming each.
    """
    if isinstance(text, Path) or Path(text).is_dir():
        return Path(text)
    if is_registered(text):
        return fetch(find(parse_reference(text)))
    if (hub := parse_hub_id(text)) is not None:
        from qvgen.models.source import resolve_source

        return resolve_source(hub.repository, hub.commit)
    return Path(text)


def find(reference: Reference) -> Registered:
    """What the registry says of a version; if it does not answer, what it said when it was last asked, with a warning."""
    uri = find_tracking()
    try:
        model = read_version(open_client(uri), reference)
    except UnreachableError as error:
        known = recall(uri, reference)
        if known is None:
            raise ValueError(f"{error}, and {reference} was never used here: it is not in the cache") from error
        print(f"warning: {error}; {reference} is version {known.version}, as it last said", file=sys.stderr)
        return known
    remember(uri, reference, model)
    return model


def fetch(model: Registered, uri: str | None = None) -> Path:
    """A folder with the files of a version, each hashed now. `uri`: of MLflow, else where it is found. Raises ValueError that
    names every place that was tried."""
    reasons: dict[str, str] = {}
    if (project := project_at(Path.cwd())) is not None:
        packed = project / PACKED
        faults = faults_of(packed, model.files) if packed.is_dir() else ["it does not exist"]
        if not faults:
            return packed
        reasons[str(packed)] = faults[0]
    tried: list[Place] = []

    def one(path: str, out: IO[bytes]) -> None:
        if not tried:  # only a model that is not in the cache needs any
            tried.extend(_places(uri))
        for place in tried:
            try:
                with place.open(model, path) as source:
                    copy_checked(source, out, model.files[path])
                return
            except Exception as error:  # each place has a library with errors of its own
                if isinstance(error, OSError) and error.errno in _NO_ROOM:  # here, and in no other place either
                    raise
                reasons[place.name] = f"{path}: {_reason(error)}"
        raise ValueError(
            f"the files of {model} are nowhere to be had:\n"
            + "\n".join(f"  {place}: {why}" for place, why in reasons.items())
            + (f"\nIt was made at git commit {model.commit}: a clone of it can `dvc pull` them" if model.commit else "")
        )

    return keep(model.files, one)


def absent(model: Registered, uri: str | None = None, more: Sequence[Place] = ()) -> str | None:
    """None if a place other than the caches of users lists every file of a version; else which place lacks what. Bytes are
    not read: `fetch` does that."""
    reasons = []
    for place in [*more, *_places(uri)]:
        try:
            gone = [path for path in model.files if not place.has(model, path)]
        except Exception as error:  # each place has a library with errors of its own
            reasons.append(f"{place.name}: {_reason(error)}")
            continue
        if not gone:
            return None
        reasons.append(f"{place.name}: it lacks {gone[0]}" + (f" and {len(gone) - 1} more" if len(gone) > 1 else ""))
    return "; ".join(reasons)


def _reason(error: Exception) -> str:
    """In a line: MLflow's first one may say that failures follow."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if lines[0].endswith(":") else 0][:200]


def _places(uri: str | None) -> list[Place]:
    known = [place for places in nearby for place in places()]
    return [*known, DvcRemote(), Artifacts(open_client(uri or find_tracking()))]


def project_at(here: Path) -> Path | None:
    """The project that a folder lies in: the nearest one above with dvc.yaml and params.yaml."""
    folders = (here, *here.parents)
    return next((f for f in folders if (f / "dvc.yaml").is_file() and (f / "params.yaml").is_file()), None)


def pull(text: str, out: Path) -> Path:
    """Copy a model to a new folder `out`, whole or not at all, for programs that know nothing of registries.

    Raises ValueError if `out` is there already and holds anything else.
    """
    source = model_folder(text)
    if not source.is_dir():
        raise ValueError(f"model {text!r:.200} does not exist: give models:/NAME@ALIAS, ORG/NAME@COMMIT or a folder")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} is there already: choose a new folder, or remove it")
    draft = out.with_name(f".{out.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        shutil.copytree(source, draft)
        if out.is_dir():
            out.rmdir()
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out
