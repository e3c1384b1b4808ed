import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageColor

from comparison.report.page import PICTURES, markdown_table, write_report
from comparison.report.ranking import missing
from comparison.report.results import read_results
from comparison.report.style import LIGHT, line_style
from comparison.report.tables import CSV_COLUMNS, ablation_table, paired_table, summary_table, tuning_table
from comparison.report.videos import scenes
from comparison.report.words import MEASURES
from tests.support.synthetic_results import METHODS, SEEDS, write_results, write_run

MAX_BYTES = 15_000_000
FINDINGS = "Φ adds *nothing* at W4A4.\n\n<script>alert(1)</script> ![x](http://127.0.0.1:9/x.png)\n"
SECTIONS = [
    *("what", "summary", "findings", "videos", "paired", "bits", "timesteps"),
    *("layers", "training", "decay", "singular", "ablations", "tuning", "cost"),
]
PLOTS = {
    *("ranking", "error_by_bits", "error_by_timestep", "training_curves", "rank_decay", "singular_values"),
    *(f"layer_error_{bits}" for bits in ("W4A4", "W3A3", "W2A4", "W2A2")),
}
VOID = {"meta", "link", "img", "source", "br"}


class Page(HTMLParser):
    """Elements with their attributes; `open` is empty at the end if every tag was closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison") / "results"
    write_results(folder)
    return folder


@pytest.fixture(scope="module")
def report(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    write_report(results, folder, FINDINGS)
    return folder


@pytest.fixture(scope="module")
def html(report: Path) -> str:
    return (report / "comparison.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_csv_has_a_line_per_run(results: Path, report: Path) -> None:
    with (report / "comparison.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0])[: len(CSV_COLUMNS)] == CSV_COLUMNS
    assert {"group", "variant", "flicker", "step_ms_fp32", "zero_inference_cost"} <= set(lines[0])
    assert "layer_error" not in lines[0]
    assert len(lines) == len(list(results.iterdir()))
    line = next(line for line in lines if line["case"] == "kd-W3A3-1")
    scores = json.loads((results / "kd-W3A3-1.json").read_text())["scores"]
    assert line["velocity_mse"] == f"{scores['velocity_mse']:.6g}"
    assert next(line for line in lines if line["method"] == "rtn")["final_loss"] == ""


@pytest.mark.slow
def test_page_is_one_closed_file_with_every_section(report: Path, html: str) -> None:
    page = Page(html)
    assert page.open == []
    assert [section["id"] for section in page.all("section")] == SECTIONS
    anchors = {link["href"] for link in page.all("a") if str(link["href"]).startswith("#")}
    assert anchors == {f"#{name}" for name in SECTIONS}
    assert (report / "comparison.html").stat().st_size < MAX_BYTES
    sources = [a.get(key) for _, a in page.elements for key in ("src", "srcset", "href", "poster") if a.get(key)]
    outside = [source for source in sources if source and not source.startswith(("data:", "#"))]
    assert outside == ["http://127.0.0.1:9/x.png"]  # a link of the findings, not a picture
    assert not re.search(r"url\(|@import", html[: html.index("</style>")])


@pytest.mark.slow
def test_page_escapes_what_it_is_given(html: str) -> None:
    assert "other<b>" not in html and "other&lt;b&gt;" in html
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
    assert "<em>nothing</em>" in html


@pytest.mark.slow
def test_pictures_and_videos_have_words(html: str, report: Path) -> None:
    page = Page(html)
    assert len(page.all("img")) == len(PLOTS) and all(len(image["alt"] or "") > 20 for image in page.all("img"))
    videos = page.all("video")
    assert len(videos) == 2 * 2 * (1 + len(METHODS))  # prompts, bits, full precision and methods
    assert all(video["aria-label"] and {"autoplay", "loop", "muted", "playsinline"} <= set(video) for video in videos)
    assert all(header["scope"] for header in page.all("th") if "style" not in header)
    assert {path.stem for path in (report / "plots").iterdir()} == set(PICTURES) < PLOTS
    for path in (report / "plots").iterdir():
        assert Image.open(path).width >= 1000
    drawn = Image.open(report / "plots" / "ranking.png").convert("RGB").getcolors()
    wanted = {ImageColor.getrgb(line_style(method, LIGHT)["color"]) for method in METHODS}
    assert wanted <= {colour for _, colour in drawn or ()}  # each method's own, as in its legend


def test_summary_ranks_and_marks(results: Path) -> None:
    table = summary_table(read_results(results), "W4A4")
    assert table.rows[0].name == "qvgen+" and table.rows[0].badges == ("best",)
    assert [row.name for row in table.rows if row.kind] == ["full_precision"] == [table.rows[-1].name]
    marked = {row.name: row.badges for row in table.rows if row.badges}
    assert marked == {"qvgen+": ("best",), "svdquant": ("extra cost",)}
    assert all(re.fullmatch(r"0\.\d{5} ± 0\.\d{5}", row.cells[1]) for row in table.rows[: len(METHODS)])


def test_a_method_with_extra_cost_is_never_the_best(tmp_path: Path) -> None:
    for seed in SEEDS:
        write_run(tmp_path, "svdquant", "W4A4", seed, velocity_mse=0.001)
        write_run(tmp_path, "kd", "W4A4", seed, velocity_mse=0.002 + 0.001 * seed)
        write_run(tmp_path, "qvgen", "W4A4", seed, velocity_mse=0.003 + 0.0001 * seed)
    write_run(tmp_path, "unquantized", "", 0, group="reference")
    table = summary_table(read_results(tmp_path), "W4A4")
    assert [row.name for row in table.rows if row.kind == "reference"] == ["unquantized"]
    assert [(row.name, row.badges) for row in table.rows[:-1]] == [
        ("svdquant", ("extra cost",)),
        ("kd", ("best",)),
        ("qvgen", ()),
    ]
    # -0.001, -0.0001, +0.0008: mean -0.0001, sd 0.0009
    assert "smaller than that of qvgen, the next, at 2 of 3 shared seeds" in table.note and "a tie" in table.note
    paired = paired_table(read_results(tmp_path), "W4A4", "qvgen")
    assert paired is not None
    row = next(row for row in paired.rows if row.name == "kd")
    assert row.cells[:4] == ("−0.00010", "0.00090", "0.1", "2 of 3") and row.badges == ("tie",)


def test_one_seed_and_diverged_runs_are_shown_as_such(tmp_path: Path) -> None:
    write_run(tmp_path, "kd", "W4A4", 0, velocity_mse=0.02)
    write_run(tmp_path, "lsq", "W4A4", 0, velocity_mse=float("nan"))
    table = summary_table(read_results(tmp_path), "W4A4")
    assert [(row.name, row.cells[:2]) for row in table.rows] == [("kd", ("1", "0.02000")), ("lsq", ("1", "diverged"))]
    write_report(tmp_path, tmp_path / "out")


def test_an_ablation_is_held_against_its_defaults_on_the_same_seeds_and_prompts(tmp_path: Path) -> None:
    for seed, single in ((0, [30.0, 30.0, 20.0, 20.0]), (1, [31.0, 30.0])):  # all kept, or as many as an ablation has
        write_run(tmp_path, "kd", "W4A4", seed, prompts=4, psnr_db=25.0, psnr_db_by_prompt=single)
    for seed, psnr in ((0, 31.0), (1, 32.0)):
        write_run(tmp_path, "kd", "W4A4", seed, group="ablation", variant="rank-8", prompts=2, psnr_db=psnr)
    table = ablation_table(read_results(tmp_path))
    assert table is not None and table.caption.endswith("PSNR of the first 2 prompts")
    (row,) = table.rows
    assert row.cells[-2:] == ("31.50 ± 0.71", "30.25 ± 0.35") and row.cells[2] == "2"


def test_tuning_marks_the_factor_of_the_compared_runs(results: Path) -> None:
    table = tuning_table(read_results(results))
    assert table is not None
    assert [(row.name, row.cells[1]) for row in table.rows if row.badges] == [("kd", "1"), ("qvgen", "1")]
    assert [row.cells[1] for row in table.rows if row.name == "kd"] == ["0.5", "1", "2"]
    error = table.columns.index(MEASURES["tuning_velocity_mse"].heading) - 1
    assert all(row.cells[error].startswith("0.07") for row in table.rows)


def test_missing_runs_are_named(tmp_path: Path) -> None:
    for method, bits, seed in (("kd", "W4A4", 0), ("kd", "W4A4", 1), ("kd", "W3A3", 0), ("qvgen", "W4A4", 1)):
        write_run(tmp_path, method, bits, seed)
    assert missing(read_results(tmp_path)) == [
        "The full-precision model has no scores: its row and its videos are absent.",
        "qvgen at W4A4: no seed 0.",
        "kd at W3A3: no seed 1.",
        "qvgen at W3A3: no run.",
    ]


def test_a_report_of_almost_nothing(tmp_path: Path) -> None:
    """One untrained run: no videos, curves, pairs or findings, and plots of an earlier report go."""
    write_run(tmp_path / "results", "rtn", "W4A4", 0, layer_error=None, velocity_mse_by_timestep=None)
    (tmp_path / "out" / "plots").mkdir(parents=True)
    (tmp_path / "out" / "plots" / "rank_decay.png").touch()
    write_report(tmp_path / "results", tmp_path / "out")
    page = Page((tmp_path / "out" / "comparison.html").read_text(encoding="utf-8"))
    assert [section["id"] for section in page.all("section")] == ["what", "summary", "cost"]
    assert [path.name for path in (tmp_path / "out" / "plots").iterdir()] == ["ranking.png"]
    assert not page.all("script")
    assert "videos are absent" in (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")


def test_before_the_first_case_the_page_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "results", "kd", "W3A3", 100, group="tuning")
    write_report(tmp_path / "results", tmp_path / "out")
    text = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert [section["id"] for section in Page(text).all("section")] == ["what", "tuning"]
    assert "No method has a finished run yet" in text
    with pytest.raises(ValueError, match="no run at W4A4 or W3A3"):
        markdown_table(tmp_path / "results")


@pytest.mark.slow
def test_same_results_same_bytes(tmp_path: Path) -> None:
    write_run(tmp_path / "results", "qvgen", "W4A4", 0)
    for name in ("a", "b"):
        write_report(tmp_path / "results", tmp_path / name)
    files = [sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in ("a", "b")]
    assert [path.name for path in files[0][:2]] == ["comparison.csv", "comparison.html"] and len(
        files[0]
    ) == 2 + 2  # one bit width
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_a_failed_report_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "results", "rtn", "W4A4", 0)
    write_report(tmp_path / "results", tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def full_disk(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path / "results", tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_contradicting_or_broken_results_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no run"):
        read_results(tmp_path / "absent")
    case = write_run(tmp_path, "kd", "W4A4", 0)
    twin = tmp_path / "twin.json"
    twin.write_text(case.read_text())
    with pytest.raises(ValueError, match=f"{case.stem} and twin are the same run"):
        read_results(tmp_path)
    twin.write_text('{"scores": {"method": "kd"')
    with pytest.raises(ValueError, match=r"twin\.json is not whole"):
        read_results(tmp_path)
    twin.write_text('{"scores": {"method": "kd", "seed": 1}}')
    with pytest.raises(ValueError, match="has no bits; repeat the run twin"):
        read_results(tmp_path)


def test_too_many_videos_are_left_out_and_counted(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comparison.report.videos.MAX_TEXT", 1)
    shown, left_out = scenes(read_results(results))
    assert (len(shown), left_out) == (1, 1)


def test_markdown_table_has_a_row_per_method_and_bits(results: Path) -> None:
    lines = markdown_table(results).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + 2 * len(METHODS)
    assert table[2].startswith("| **qvgen+** | W4A4 | 3 | 0.01")
    assert [line.split("|")[1].strip() for line in table if "†" in line] == ["svdquant †"] * 2
    assert "1.13" in table[2] and "0.92" in table[-1]
