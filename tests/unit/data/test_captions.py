"""captions.csv: every caption whole and beside its own video, or an error that names the line."""

from pathlib import Path

import pytest

from qvgen.data.captions import read_captions


def write(folder: Path, content: str | bytes) -> Path:
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (folder / name).write_bytes(b"")
    (folder / "captions.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_captions(tmp_path: Path) -> None:
    write(tmp_path, 'caption,file\n"a red ball, bouncing",a.mp4\n\n a dog ,b.mp4\n"two\nlines",c.mp4\n')
    found = [(path.name, caption) for path, caption in read_captions(tmp_path)]
    assert found == [("a.mp4", "a red ball, bouncing"), ("b.mp4", "a dog"), ("c.mp4", "two\nlines")]


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path: Path) -> None:
    write(tmp_path, b"\xef\xbb\xbffile,caption\r\na.mp4,caf\xc3\xa9\r\n")
    assert read_captions(tmp_path) == [(tmp_path / "a.mp4", "café")]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("a.mp4,a red ball, bouncing\n", "line 2 has 3 columns, the header 2: a caption with a comma needs quotes"),
        ("a.mp4,a dog\nb.mp4\n", "line 3 has 1 columns"),
        ('a.mp4,a dog\nb.mp4,"a red ball\nc.mp4,a cat\n', "line 3: unexpected end of data"),
        ('a.mp4,"a dog\nb.mp4,"a cat"\n', "line 2: "),
        ("a.mp4,a dog\nb.mp4, \n", "line 3: the caption of b.mp4 is empty"),
        ("a.mp4,a dog\nd.mp4,a cat\n", "d.mp4 does not exist"),
        ("../a.mp4,a dog\n", "line 2: '../a.mp4' must be a path inside"),
        ("/etc/hostname,a dog\n", "line 2: '/etc/hostname' must be a path inside"),
        ("a.mp4," + "x" * 140_000 + "\n", "line 2: field larger than field limit"),
        ("", "lists no videos"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: str, says: str) -> None:
    write(tmp_path, "file,caption\n" + rows)
    with pytest.raises(ValueError, match=r"captions\.csv") as error:
        read_captions(tmp_path)
    assert says in str(error.value)


@pytest.mark.parametrize("content", ["", "name,text\na.mp4,a dog\n"])
def test_other_columns_are_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ValueError, match="must have columns file and caption"):
        read_captions(write(tmp_path, content))


def test_another_encoding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"captions\.csv is not UTF-8"):
        read_captions(write(tmp_path, b"file,caption\na.mp4,caf\xe9\n"))


def test_lines_of_json(tmp_path: Path) -> None:
    write(tmp_path, "")
    (tmp_path / "captions.csv").unlink()
    rows = [
        '{"file": "a.mp4", "caption": "a \\"red\\" ball,\\nbouncing 🏀"}',
        "",
        '{"caption": "a dog", "file": "b.mp4", "fps": 8}',
    ]
    (tmp_path / "captions.jsonl").write_bytes("\r\n".join(["\ufeff" + rows[0], *rows[1:]]).encode())
    found = [(path.name, caption) for path, caption in read_captions(tmp_path)]
    assert found == [("a.mp4", 'a "red" ball,\nbouncing 🏀'), ("b.mp4", "a dog")]
    for bad, says in (
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 must be an object"),
        ('{"file": "a.mp4"}', "line 2 must be an object"),
        ('{"file": "../a.mp4", "caption": "x"}', "line 2: '../a.mp4' must be a path inside"),
    ):
        (tmp_path / "captions.jsonl").write_text(f"{rows[0]}\n{bad}\n")
        with pytest.raises(ValueError, match=r"captions\.jsonl") as error:
            read_captions(tmp_path)
        assert says in str(error.value)
    (tmp_path / "captions.csv").write_text("file,caption\na.mp4,a dog\n")
    with pytest.raises(ValueError, match=r"holds captions\.csv and captions\.jsonl; keep the one"):
        read_captions(tmp_path)


def test_texts_beside_the_videos(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name in ("b.webm", "more/a.mp4", "clip.v2.gif"):
        (tmp_path / name).write_bytes(b"")
        (tmp_path / name).with_suffix(".txt").write_text(f" of {name},\r\nin two lines\n", encoding="utf-8", newline="")
    (tmp_path / ".cache").write_bytes(b"")
    found = [(path.relative_to(tmp_path).as_posix(), caption) for path, caption in read_captions(tmp_path)]
    assert [name for name, _ in found] == ["b.webm", "clip.v2.gif", "more/a.mp4"]
    assert found[0][1] == "of b.webm,\nin two lines"
    (tmp_path / "d.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"d\.mp4 has no caption: write d\.txt beside it"):
        read_captions(tmp_path)
    (tmp_path / "d.mp4").rename(tmp_path / "b.mp4")
    with pytest.raises(ValueError, match=r"b\.txt must lie beside one video of the same name, found b\.mp4, b\.webm"):
        read_captions(tmp_path)
