"""Which videos of a folder have which captions: captions.csv, captions.jsonl, or a text file beside each video."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

LONGEST_NAME = 255  # bytes of a part of a path
LONGEST_PATH = 2000  # bytes of an entry of column file; with the folder, systems allow 4095
TABLE, LINES, BESIDE = "captions.csv", "captions.jsonl", ".txt"

Row = tuple[Path, str]


def read_captions(folder: str | Path) -> list[Row]:
    """Video files and captions (UTF-8, with or without a byte-order mark), in the order of the list: captions.csv with columns
    file and caption, captions.jsonl with an object {"file": ..., "caption": ...} on each line, or by name where
    each video clip.mp4 has a clip.txt beside it, whose text is the caption.

    Raises ValueError, naming the line, for a missing or empty list, two of them, a missing file or one outside the folder, an
    empty caption, a caption with a comma that is not quoted, and a quote that is not closed.
    """
    folder = Path(folder)
    lists = [folder / name for name in (TABLE, LINES) if (folder / name).is_file()]
    if len(lists) > 1:
        raise ValueError(f"{folder} holds {TABLE} and {LINES}; keep the one that is meant")
    if not lists:
        return _texts_beside(folder)
    (listed,) = lists
    rows = list(_rows_of_table(listed) if listed.name == TABLE else _rows_of_lines(listed))
    if not rows:
        raise ValueError(f"{listed} lists no videos")
    return rows


def _rows_of_table(table: Path) -> Iterator[Row]:
    (_, header), *lines = list(_read_table(table)) or [(1, [])]
    if not {"file", "caption"} <= set(header):
        raise ValueError(f"{table} must have columns file and caption, found {header!s:.200}")
    for line, fields in lines:
        if len(fields) != len(header):
            raise ValueError(
                f"{table} line {line} has {len(fields)} columns, the header {len(header)}: a caption with a comma needs "
                'quotes, file.mp4,"a red ball, bouncing"'
            )
        row = dict(zip(header, fields, strict=True))
        yield _checked(f"{table} line {line}", table.parent, row["file"], row["caption"])


def _rows_of_lines(lines: Path) -> Iterator[Row]:
    for number, (name, caption) in read_lines(lines, ("file", "caption")):
        yield _checked(f"{lines} line {number}", lines.parent, name, caption)


def read_lines(lines: Path, keys: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Of the lines of a .jsonl file that are not blank their numbers and the texts of `keys`. Raises ValueError that names the
    line for one that is no object with these texts; what else an object holds does not count."""
    for number, text in enumerate(read_text(lines).split("\n"), start=1):
        if not text.strip():
            continue
        where = f"{lines} line {number}"
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error!s:.200}") from None
        found = [row.get(key) for key in keys] if isinstance(row, dict) else []
        texts = [value for value in found if isinstance(value, str)]
        if len(texts) != len(keys):
            named = " and ".join(f'"{key}"' for key in keys)
            raise ValueError(f"{where} must be an object with the text{'s' * (len(keys) > 1)} {named}, found {text!s:.100}")
        yield number, texts


def _texts_beside(folder: Path) -> list[Row]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder)))
    videos: dict[Path, list[Path]] = {path: [] for path in found if path.suffix == BESIDE}
    others = [path for path in found if path.suffix != BESIDE]
    if not videos:
        raise ValueError(
            f"{folder / TABLE} does not exist; write a CSV with columns file and caption, one row per video, or {LINES}, or a "
            f"file clip{BESIDE} beside each clip.mp4"
        )
    for path in others:
        if path.with_suffix(BESIDE) not in videos:
            raise ValueError(f"{path} has no caption: write {path.with_suffix(BESIDE).name} beside it")
        videos[path.with_suffix(BESIDE)].append(path)
    rows = []
    for text, beside in videos.items():
        if len(beside) != 1:
            names = ", ".join(path.name for path in beside) or "none"
            raise ValueError(f"{text} must lie beside one video of the same name, found {names}")
        rows.append(_checked(str(text), folder, str(beside[0].relative_to(folder)), read_text(text)))
    return rows


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _checked(where: str, folder: Path, name: str, caption: str) -> Row:
    name, caption = name.strip(), caption.strip()
    lengths = [len(part.encode(errors="replace")) for part in Path(name).parts]
    if max(lengths, default=0) > LONGEST_NAME or sum(lengths) > LONGEST_PATH:
        raise ValueError(f"{where}: {name[:40]!r}... is longer than a file name can be")
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise ValueError(f"{where}: {name!r} must be a path inside {folder}")
    if not (folder / name).is_file():
        raise ValueError(f"{where}: {folder / name} does not exist")
    if not caption:
        raise ValueError(f"{where}: the caption of {name} is empty")
    return folder / name, caption


def read_text(path: Path) -> str:
    """UTF-8 with or without a byte-order mark. Raises ValueError for another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None


def _read_table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV that are not blank, each with the line it begins on. Raises ValueError, naming that line."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader, line = csv.reader(file, strict=True), 1
        try:
            for fields in reader:
                if fields:
                    yield line, fields
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{path} line {line}: {error}; is a quote that begins there not closed?") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
