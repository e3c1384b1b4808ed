"""`qvgen vbench`: what is refused and why, how the other environment is called, and the real package where there is one.

The stand-in is a real virtual environment whose package `vbench` has the real one's interface and records its calls; its
scores mean nothing. The last tests run the real vbench 0.1.5 where QVGEN_VBENCH_PYTHON names an environment that has it.
"""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from pipelines import cli
from qvgen.evaluation.vbench.evaluate import PYTHON_VARIABLE
from qvgen.evaluation.vbench.weights import NEEDED, PAPER_DIMENSIONS
from qvgen.sampling.video import write_video

REAL = os.environ.get(PYTHON_VARIABLE)
PATIENCE_S = 60  # for a process to start or end on a busy machine
PROMPTS = {
    "a dog, running": ["motion_smoothness", "dynamic_degree"],
    "alley": ["scene"],
    "In a still frame": ["temporal_flickering"],
}
STAND_IN = """
    import json, os, subprocess, sys, time, urllib.request
    from pathlib import Path

    class VBench:
        def __init__(self, device, full_info_dir, output_path):
            self.calls, self.output = [str(device), full_info_dir, output_path], Path(output_path)

        def evaluate(self, videos_path, name, dimension_list, local):
            (dimension,) = dimension_list
            record = {"calls": self.calls, "name": name, "local": local, "videos": sorted(os.listdir(videos_path))}
            record["environment"] = dict(os.environ)
            record["argv"], record["isolated"] = sys.argv, sys.flags.isolated
            record["pid"] = os.getpid()
            whole = [os.path.getsize(os.path.join(videos_path, video)) for video in record["videos"]]
            assert all(whole), "links to nothing"
            Path(os.environ["RECORD"]).write_text(json.dumps(record))
            behaviour = os.environ.get("BEHAVIOUR")
            if behaviour == "wget":
                subprocess.run(["wget", "http://127.0.0.1:9/weights.pth"], check=True)
            if behaviour == "url":
                urllib.request.urlretrieve("http://127.0.0.1:9/weights.pth")
            if behaviour == "long":
                time.sleep(600)
            if behaviour == "crash":
                raise RuntimeError("out of order")
            if behaviour == "silent":
                return
            score = float("nan") if behaviour == "nan" else 0.25 if dimension == "dynamic_degree" else 0.75
            (self.output / f"{name}_eval_results.json").write_text(json.dumps({dimension: [score, []]}))
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a virtual environment with a package vbench 0.1.5 and a module torch that has no accelerator."""
    folder = tmp_path_factory.mktemp("vbench") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "vbench").mkdir()
    (packages / "vbench" / "__init__.py").write_text(textwrap.dedent(STAND_IN))
    info = [{"prompt_en": prompt, "dimension": dimensions} for prompt, dimensions in PROMPTS.items()]
    (packages / "vbench" / "VBench_full_info.json").write_text(json.dumps(info))
    torch_module = (
        "from contextlib import nullcontext as no_grad\n\n\nclass cuda:\n    is_available = staticmethod(lambda: False)\n\n\n"
        "device = str\n"
    )
    (packages / "torch.py").write_text(torch_module)
    metadata = packages / "vbench-0.1.5.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vbench\nVersion: 0.1.5\n")
    return folder


@pytest.fixture
def world(monkeypatch, stand_in: Path, tmp_path: Path) -> Path:
    """A place with an empty cache, a folder of all videos of the stand-in's prompts, and variables that point there."""
    monkeypatch.setenv(PYTHON_VARIABLE, str(stand_in))
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("RECORD", str(tmp_path / "record.json"))
    for name in ("TRANSFORMERS_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE", "BEHAVIOUR"):
        monkeypatch.delenv(name, raising=False)
    videos = tmp_path / "videos"
    videos.mkdir()
    for prompt in PROMPTS:
        for sample in range(5):
            (videos / f"{prompt}-{sample}.mp4").write_bytes(b"a video")
    (videos / "notes.json").write_text("VBench would take .json for the suffix of the videos")
    return tmp_path


def give_weights(world: Path, *dimensions: str) -> None:
    for dimension in dimensions:
        for file in NEEDED[dimension]:
            path = (world / "hf" / "hub" if file.hub else world / "cache") / file.paths[-1].replace("*", "0" * 40)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"weights")


def run(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["qvgen", "vbench", *map(str, arguments)])
        cli.main()
    return int(stop.value.code or 0)


def evaluate(capsys, world: Path, dims: str, *more: object) -> tuple[int, dict]:
    code = run("--videos", world / "videos", "--dims", dims, "--json", *more)
    return code, json.loads(capsys.readouterr().out)


def test_each_missing_file_is_named(capsys, world: Path) -> None:
    code, content = evaluate(capsys, world, "motion_smoothness,scene")
    assert code == 3
    assert not (world / "record.json").exists(), "VBench was started"
    smoothness, scene = (content["dims"][name]["refused"] for name in ("motion_smoothness", "scene"))
    assert f"{world}/cache/amt_model/amt-s.pth is missing, from https://" in smoothness and "CC BY-NC" in smoothness
    assert "tag2text_swin_14m.pth is missing" in scene
    assert f"{world}/hf/hub/models--bert-base-uncased/snapshots/*/model.safetensors is missing" in scene
    assert content["average"] is None and (content["average_of"], content["asked"]) == (0, 2)


def test_what_is_there_runs_and_the_average_says_over_how_many(capsys, world: Path) -> None:
    give_weights(world, "dynamic_degree")
    code, content = evaluate(capsys, world, "dynamic_degree, temporal_flickering,scene,dynamic_degree")
    assert code == 3
    assert content["dims"]["dynamic_degree"] == {"videos": 5, "expected": 5, "score": 0.25}
    assert content["dims"]["temporal_flickering"]["score"] == 0.75
    assert "score" not in content["dims"]["scene"]
    assert (content["average"], content["average_of"], content["asked"]) == (0.5, 2, 3)
    assert run("--videos", world / "videos", "--dims", "dynamic_degree,scene") == 3
    shown = capsys.readouterr().out
    assert "Mean over 1 of the 2 dimensions asked for: 0.2500" in shown and "scene was refused: " in shown


def test_all_that_was_asked_for(capsys, world: Path) -> None:
    give_weights(world, "dynamic_degree", "motion_smoothness", "scene")
    code, content = evaluate(capsys, world, "dynamic_degree,motion_smoothness,scene,temporal_flickering")
    assert code == 0 and content["average_of"] == content["asked"] == 4


def test_how_the_package_is_called(capsys, world: Path, stand_in: Path) -> None:
    give_weights(world, "scene", "subject_consistency")
    assert evaluate(capsys, world, "scene", "--keep", world / "kept")[0] == 0
    record = json.loads((world / "record.json").read_text())
    device, full_info, output = record["calls"]
    assert (device, output) == ("cpu", str(world / "kept"))
    assert Path(full_info).is_file() and Path(full_info).is_relative_to(stand_in)
    assert record["videos"] == [f"alley-{sample}.mp4" for sample in range(5)], "only the dimension's videos, and nothing else"
    assert record["name"] == "scene" and record["local"] is True and record["isolated"] == 1
    environment = record["environment"]
    assert environment["HF_HUB_OFFLINE"] == environment["TRANSFORMERS_OFFLINE"] == "1"
    assert environment["VBENCH_CACHE_DIR"] == str(world / "cache")
    assert environment["TRANSFORMERS_CACHE"] == str(world / "hf" / "hub")
    assert (world / "kept" / "scene_eval_results.json").is_file() and (world / "kept" / "scene.log").is_file()


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ("wget", "wanted to run wget http://127.0.0.1:9/weights.pth: nothing is downloaded unasked"),
        ("url", "wanted to connect to 127.0.0.1: nothing is downloaded unasked"),
        ("crash", "vbench ended with code 1: RuntimeError: out of order"),
        ("silent", "vbench wrote no score for temporal_flickering"),
        ("nan", "not a number"),
    ],
)
def test_failures(monkeypatch, capsys, world: Path, behaviour: str, says: str) -> None:
    monkeypatch.setenv("BEHAVIOUR", behaviour)
    code, content = evaluate(capsys, world, "temporal_flickering,scene")
    assert code == 1
    assert says in content["dims"]["temporal_flickering"]["error"]
    assert content["average"] is None


def test_it_ends_with_qvgen(world: Path) -> None:
    """Killed, qvgen cannot stop the other process, which may hold most of the memory: it sees that by itself."""
    import psutil

    command = [sys.executable, "-m", "pipelines.cli", "vbench", "--videos", world / "videos", "--dims", "temporal_flickering"]
    with subprocess.Popen(command, env=os.environ | {"BEHAVIOUR": "long"}, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + PATIENCE_S
        while not (world / "record.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)  # until the record is whole
        other = psutil.Process(json.loads((world / "record.json").read_text())["pid"])
        process.kill()
    assert psutil.wait_procs([other], timeout=PATIENCE_S)[1] == []


def test_missing_videos(capsys, world: Path) -> None:
    for sample in range(4):
        (world / "videos" / f"In a still frame-{sample}.mp4").unlink()
    code, content = evaluate(capsys, world, "temporal_flickering")
    refused = content["dims"]["temporal_flickering"]["refused"]
    assert code == 3
    assert refused.startswith("4 of 5 videos are missing: 'In a still frame-0.mp4'") and "and 1 more" in refused
    assert "--partial" in refused
    code, content = evaluate(capsys, world, "temporal_flickering", "--partial")
    assert code == 0 and content["dims"]["temporal_flickering"] == {"videos": 1, "expected": 5, "score": 0.75}
    (world / "videos" / "In a still frame-4.mp4").unlink()
    assert evaluate(capsys, world, "temporal_flickering", "--partial")[0] == 3


def test_what_is_needed_can_be_asked_without_videos(capsys, world: Path) -> None:
    give_weights(world, "motion_smoothness")
    assert run() == 3
    shown = capsys.readouterr().out
    assert all(name in shown for name in PAPER_DIMENSIONS)
    assert f"there    {world}/cache/amt_model/amt-s.pth" in shown
    assert f"missing  {world}/cache/raft_model/models/raft-things.pth" in shown
    assert run("--dims", "motion_smoothness,temporal_flickering") == 0
    assert "temporal_flickering: needs no files" in capsys.readouterr().out
    give_weights(world, *PAPER_DIMENSIONS)
    assert run("--json") == 0
    assert all(file["there"] for files in json.loads(capsys.readouterr().out).values() for file in files)


def test_the_prompts_are_the_packages(capsys, world: Path) -> None:
    assert run("--list-prompts", "--dims", "scene,motion_smoothness,dynamic_degree") == 0
    assert capsys.readouterr().out.splitlines() == ["alley", "a dog, running"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dims", "beauty"], "dimension 'beauty' is not one of imaging_quality"),
        (["--dims", "color"], "color needs detectron2"),
        (["--videos", "nowhere"], "nowhere is not a folder"),
        (["--videos", ".", "--python", "nowhere/python"], "cannot be run"),
        (["--videos", ".", "--python", sys.executable], "has no package vbench"),
    ],
)
def test_bad_arguments(monkeypatch, capsys, world: Path, arguments: list[str], says: str) -> None:
    monkeypatch.chdir(world)
    assert run(*arguments) == 1
    assert says in capsys.readouterr().err


def test_another_version_is_refused(monkeypatch, capsys, world: Path, stand_in: Path) -> None:
    (metadata,) = stand_in.glob("lib/python*/site-packages/vbench-0.1.5.dist-info/METADATA")
    before = metadata.read_text()
    metadata.write_text(before.replace("0.1.5", "0.2"))
    try:
        assert run("--videos", world / "videos") == 1
    finally:
        metadata.write_text(before)
    assert "has vbench 0.2, 0.1.5 is needed" in capsys.readouterr().err
    monkeypatch.delenv(PYTHON_VARIABLE)
    assert run("--videos", world / "videos") == 1
    assert "--python or QVGEN_VBENCH_PYTHON" in capsys.readouterr().err


real = pytest.mark.skipif(not REAL, reason=f"{PYTHON_VARIABLE} does not name the python of an environment with vbench 0.1.5")


@pytest.fixture
def real_world(monkeypatch, tmp_path: Path) -> Path:
    """An empty cache, and one video of each of three dimensions: a bright square that moves, or the same that stands."""
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name, speed in {"In a still frame, a stop sign": 0, "a person swimming in ocean": 4, "alley": 4}.items():
        clip = torch.full((3, 16, 256, 256), -1.0)
        for t in range(16):
            clip[:, t, 64:128, 32 + speed * t : 96 + speed * t] = 1.0
        write_video(tmp_path / "videos" / f"{name}-0.mp4", clip)
    return tmp_path


@real
@pytest.mark.slow
def test_the_real_package_scores_what_needs_no_weights(capsys, real_world: Path) -> None:
    code, content = evaluate(capsys, real_world, "temporal_flickering", "--partial", "--keep", real_world / "kept")
    assert code == 0, content
    outcome = content["dims"]["temporal_flickering"]
    assert outcome == {"videos": 1, "expected": 375, "score": pytest.approx(1.0, abs=1e-3)}
    kept = json.loads((real_world / "kept" / "temporal_flickering_eval_results.json").read_text())
    assert kept["temporal_flickering"][1][0]["video_path"].endswith("/In a still frame, a stop sign-0.mp4")


@real
@pytest.mark.slow
def test_the_real_package_is_refused_what_has_no_weights(capsys, real_world: Path) -> None:
    code, content = evaluate(capsys, real_world, ",".join(PAPER_DIMENSIONS), "--partial")
    assert code == 3 and content["average_of"] == 0
    assert all("is missing, from" in outcome["refused"] for outcome in content["dims"].values())
    assert not (real_world / "cache").exists() or not list((real_world / "cache").rglob("*.*"))


@real
@pytest.mark.slow
def test_the_real_prompts(capsys, real_world: Path) -> None:
    """251 for the papers' eight dimensions, each of which can name a file."""
    from qvgen.sampling.folder import read_prompts

    assert run("--list-prompts") == 0
    (real_world / "prompts.txt").write_text(capsys.readouterr().out)
    assert len(read_prompts(real_world / "prompts.txt")) == 251


@real
@pytest.mark.slow
def test_the_real_package_downloads_nothing(monkeypatch, capsys, real_world: Path) -> None:
    """If the table of weight files were wrong: the package itself reaches for what it lacks, and is stopped."""
    monkeypatch.setitem(NEEDED, "motion_smoothness", ())
    code, content = evaluate(capsys, real_world, "motion_smoothness", "--partial")
    assert code == 1
    assert "wanted to run wget" in content["dims"]["motion_smoothness"]["error"]
