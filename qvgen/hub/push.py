"""A packed folder to Hugging Face: planned, shown, and sent only when it proves whole and there are credentials."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qvgen.models.source import PICKLES

_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CARD = "README.md"


@dataclass(frozen=True)
class Plan:
    """What a push would create and send."""

    folder: Path
    repository: str
    files: dict[str, int]  # path in the repository -> bytes
    card: bytes  # README.md as it is sent

    def __str__(self) -> str:
        width = max(map(len, self.files))
        rows = [f"  {name:{width}}  {size:>14,}" for name, size in self.files.items()]
        total = f"  {'together':{width}}  {sum(self.files.values()):>14,}"
        return "\n".join([f"model repository {self.repository} (created if it is not there)", *rows, total + " bytes"])


def plan(folder: Path, repository: str, measured: str = "") -> Plan:
    """Every file of a packed folder; `measured` is added to the model card, which was written before anything was.

    Raises ValueError for a repository id that is none, a folder that is not whole, as `qvgen verify` finds it, and for a
    pickle or a link out of the folder.
    """
    from qvgen.checkpoint.declared import weight_files
    from qvgen.checkpoint.packed import packed_denoisers, verify_folder
    from qvgen.packing.record import verify

    if not _ID.fullmatch(repository):
        raise ValueError(f"{repository!r:.200} is no repository of Hugging Face: write ORG/NAME")
    verify_folder(folder)
    for component in packed_denoisers(folder):
        if not verify(weight_files(folder / component)):  # whatever QVGEN_VERIFY says
            raise ValueError(
                f"{folder / component} records no hashes, so nobody who downloads it could check it; pack it again"
            )
    if not (folder / _CARD).is_file():
        raise ValueError(f"{folder} has no {_CARD}, which says whose model this is and under which licence")
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or path.is_dir():
            continue
        if path.suffix in PICKLES:
            raise ValueError(f"{path} is a pickle: whoever loads it runs whatever code it holds; remove it")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} is a link to {path.resolve()}, outside the folder: put the file itself there")
        files[name.as_posix()] = path.stat().st_size
    card = (folder / _CARD).read_bytes() + (f"\n{measured.rstrip()}\n".encode() if measured else b"")
    return Plan(folder, repository, files | {_CARD: len(card)}, card)


def push(planned: Plan, *, private: bool) -> str:
    """Create the repository if it is not there and send the files in one commit; return the commit's address.

    Raises ValueError without credentials, before anything is created, and for what Hugging Face refuses.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    if not huggingface_hub.get_token():
        raise ValueError("no credentials for Hugging Face: `hf auth login`, or HF_TOKEN, with the right to write")
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(planned.repository, repo_type="model", private=private, exist_ok=True)
        added = [
            huggingface_hub.CommitOperationAdd(name, planned.card if name == _CARD else planned.folder / name)
            for name in planned.files
        ]
        done = api.create_commit(planned.repository, added, commit_message="Packed by qvgen")
    except HfHubHTTPError as error:
        raise ValueError(f"{planned.repository}: {error}") from None
    return str(done.commit_url)
