"""Writing shards that a run which is interrupted does not write again, and that several processes share.

The samples of a folder are planned before the first is made: sample i belongs to shard i // shard_size whatever happens to the
others. A shard is done when the record beside it is written, which is the last thing that happens to it. It belongs to one
process, which makes it whole: a batch that reaches into shards of two is made by both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qvgen.share import ALONE, Share

Save = Callable[[Path, list[Any]], None]  # (file, rows in order)


class ShardWriter:
    """Shards of a folder for `total` planned samples, of which this process makes its `share`. `save` writes one's rows."""

    def __init__(self, folder: Path, total: int, shard_size: int, save: Save, share: Share = ALONE) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.total, self.shard_size, self.share, self._save = folder, total, shard_size, share, save
        self._rows: dict[int, Any] = {}
        self._skipped: dict[int, dict[str, str]] = {}  # shard -> sample's name -> reason

    def spans(self, batch_size: int) -> Iterator[range]:
        """The samples in batches of the same bounds in every run and process, those that are done too."""
        for start in range(0, self.total, batch_size):
            yield range(start, min(start + batch_size, self.total))

    def done(self, span: range | None = None) -> bool:
        """Whether this process has nothing to do for a span, or for any sample."""
        return not any(self._is_open(shard) for shard in {i // self.shard_size for i in span or range(self.total)})

    def wait(self) -> None:
        """Until the shards of all processes are done."""
        shards = range(-(-self.total // self.shard_size))
        self.share.wait(self.folder.name, lambda: [shard for shard in shards if not self._record(shard).exists()])

    def add(self, span: range, rows: Mapping[int, Any], skipped: Mapping[int, tuple[str, str]] | None = None) -> None:
        """The samples of the next span that is not done: rows by position, and (name, reason) of those left out."""
        first, last = span.start // self.shard_size, (span.stop - 1) // self.shard_size
        self._rows |= {i: row for i, row in rows.items() if self._is_open(i // self.shard_size)}
        for i, (name, reason) in (skipped or {}).items():
            self._skipped.setdefault(i // self.shard_size, {})[name] = reason
        for shard in range(first, last + 1):
            if min((shard + 1) * self.shard_size, self.total) <= span.stop and self._is_open(shard):
                self._flush(shard)

    def skipped(self) -> dict[str, str]:
        """Name -> reason of what was left out, in this run, in those before it and by other processes."""
        found: dict[str, str] = {}
        for record in sorted(self.folder.glob("shard-*.json")):
            found |= json.loads(record.read_text(encoding="utf-8"))
        for waiting in self._skipped.values():
            found |= waiting
        return found

    def _is_open(self, shard: int) -> bool:
        return self.share.has(shard) and not self._record(shard).exists()

    def _flush(self, shard: int) -> None:
        positions = range(shard * self.shard_size, (shard + 1) * self.shard_size)
        path = self.folder / f"shard-{shard:05d}.safetensors"
        rows = [self._rows.pop(i) for i in positions if i in self._rows]
        if rows:
            self._save(path, rows)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(self._skipped.pop(shard, {}), ensure_ascii=False), encoding="utf-8")
        draft.replace(self._record(shard))

    def _record(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.json"


def remove_records(folder: Path) -> None:
    """Of a finished folder of folders: they tell nothing that its reader needs."""
    for record in folder.glob("*/shard-*.json"):
        record.unlink()
        if not any(record.parent.iterdir()):
            record.parent.rmdir()
