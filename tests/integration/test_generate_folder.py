"""`qvgen generate --prompts` on real, small, untrained pipelines: the same folder however it came about."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.commands.generate.manifest import manifest_path
from qvgen.models.tiny import TINY_CLIP, tiny_pipeline
from qvgen.sampling.folder import video_seed

PROMPTS = ["a red digit three", "a blue digit one", "a green digit two, moving up"]
SAMPLES = 2
GENERATION = {
    "frames": TINY_CLIP.frames,
    "height": TINY_CLIP.height,
    "width": TINY_CLIP.width,
    "max_sequence_length": TINY_CLIP.max_sequence_length,
    "inference_steps": 2,
    "guidance_scale": 2.0,
    "fps": 8,
}
ATTEMPTS = 5
PATIENCE_S = 120  # for a process to write its first videos on a busy machine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_pipeline("wan", tmp_path_factory.mktemp("pipeline") / "wan")
    (folder / "generation.json").write_text(json.dumps(GENERATION))
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.mark.parametrize(
    ("family", "frames", "said"),
    [
        ("wan_image", 9, "from a first frame, which a list of prompts does not have"),
        ("pixart", 1, "makes images, and a list of prompts gives videos"),
    ],
)
def test_a_model_that_reads_or_makes_images_is_refused(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, frames: int, said: str
) -> None:
    folder = tiny_pipeline(family, tmp_path / "model")
    (folder / "generation.json").write_text(json.dumps(GENERATION | {"frames": frames}))
    assert run(folder, prompts, tmp_path / "out") == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def arguments(model: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    listed = ["--model", str(model), "--prompts", str(prompts), "--out", str(out)]
    return ["generate", *listed, "--samples", str(SAMPLES), "--threads", "1", *more]


def run(model: Path, prompts: Path, out: Path, *more: str) -> int:
    """Exit code of the command, in this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["qvgen", *arguments(model, prompts, out, *more)])
        cli.main()
    return int(stop.value.code or 0)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def uninterrupted(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("videos") / "whole"
    assert run(model, prompts, out) == 0
    return out


def test_names_and_videos(monkeypatch, uninterrupted: Path, model: Path, tmp_path: Path) -> None:
    videos = content(uninterrupted)
    assert sorted(videos) == sorted(f"{prompt}-{sample}.mp4" for prompt in PROMPTS for sample in range(SAMPLES))
    assert len(set(videos.values())) == len(videos)
    single = ["--model", str(model), "--prompt", PROMPTS[1], "--seed", str(video_seed(0, PROMPTS[1], 1))]
    monkeypatch.setattr(sys, "argv", ["qvgen", "generate", *single, "--out", str(tmp_path / "one.mp4")])
    with pytest.raises(SystemExit):
        cli.main()
    assert (tmp_path / "one.mp4").read_bytes() == videos[f"{PROMPTS[1]}-1.mp4"]


@pytest.mark.slow
def test_two_processes_make_the_same_folder(uninterrupted: Path, model: Path, prompts: Path, tmp_path: Path) -> None:
    assert run(model, prompts, tmp_path / "two", "--processes", "2") == 0
    assert content(tmp_path / "two") == content(uninterrupted)
    assert manifest_path(tmp_path / "two").read_bytes() == manifest_path(uninterrupted).read_bytes()


def test_order_and_shards_do_not_matter(uninterrupted: Path, model: Path, tmp_path: Path) -> None:
    turned = tmp_path / "turned.txt"
    turned.write_text("\n\n".join(reversed(PROMPTS)))
    assert run(model, turned, tmp_path / "out", "--shard", "2/2") == 0
    assert len(content(tmp_path / "out")) == len(PROMPTS) * SAMPLES // 2
    assert run(model, turned, tmp_path / "out", "--shard", "1/2") == 0
    assert content(tmp_path / "out") == content(uninterrupted)


def kill_at_first_video(listed: list[str], out: Path) -> None:
    """Run the command and kill -9 all its processes as soon as a video is whole."""
    command = [sys.executable, "-m", "pipelines.cli", *listed]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + PATIENCE_S
        while not list(out.glob("[!.]*.mp4")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_killed_and_run_again(uninterrupted: Path, model: Path, prompts: Path, tmp_path: Path, processes: str) -> None:
    for attempt in range(ATTEMPTS):  # six videos take half a second: this process may look too late on a busy machine
        out = tmp_path / f"out-{attempt}"
        kill_at_first_video(arguments(model, prompts, out, "--processes", processes), out)
        before = {path.name: path.stat().st_mtime_ns for path in out.glob("[!.]*.mp4")}
        if len(before) < len(PROMPTS) * SAMPLES:
            break
    assert 0 < len(before) < len(PROMPTS) * SAMPLES, "never killed in the middle"
    (out / f".{PROMPTS[-1]}-1.4194304.mp4").write_bytes(b"half a video of a process that is no more")
    assert run(model, prompts, out) == 0
    assert content(out) == content(uninterrupted)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before, "whole videos were made again"


def test_half_a_video_of_a_process_that_is_no_more(begun: Path, model: Path, prompts: Path) -> None:
    """Also one that is a zombie, as the processes of a killed one can be; what a live process writes is left alone."""
    whole = content(begun)
    with subprocess.Popen([sys.executable, "-c", ""]) as zombie:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and its exit code is not fetched
        for pid in (zombie.pid, 4194304, os.getpid()):
            (begun / f".{PROMPTS[0]}-0.{pid}.mp4").write_bytes(b"half")
        (begun / f".not ours-0.{zombie.pid}.mp4").write_bytes(b"half")
        assert run(model, prompts, begun) == 0
    left = {f".{PROMPTS[0]}-0.{os.getpid()}.mp4", f".not ours-0.{zombie.pid}.mp4"}
    assert content(begun).keys() - whole.keys() == left


@pytest.mark.slow
def test_processes_end_with_the_first_one(model: Path, prompts: Path, tmp_path: Path) -> None:
    """Killed alone, as by the kernel for want of memory: the others finish their video and go."""
    import psutil

    out = tmp_path / "out"
    command = [sys.executable, "-m", "pipelines.cli", *arguments(model, prompts, out, "--processes", "2")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE_S
    while not list(out.glob("[!.]*.mp4")) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert children
    _gone, alive = psutil.wait_procs(children, timeout=PATIENCE_S)
    assert alive == []


def test_samples_of_a_batch_do_not_depend_on_what_is_there(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(model, prompts, out, "--batch-size", "2") == 0
    whole = content(out)
    for name in (f"{PROMPTS[0]}-1.mp4", f"{PROMPTS[2]}-0.mp4"):
        (out / name).unlink()
    (out / f"{PROMPTS[1]}-0.mp4").write_bytes(b"")  # what a power failure leaves
    assert run(model, prompts, out, "--batch-size", "2") == 0
    assert content(out) == whole


@pytest.fixture
def begun(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of the folder, with its manifest."""
    out = tmp_path / "begun"
    shutil.copytree(uninterrupted, out)
    shutil.copy(manifest_path(uninterrupted), manifest_path(out))
    return out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--seed", "1"], "seed 0 there, 1 now"),
        (["--steps", "3"], "inference_steps 2 there, 3 now"),
        (["--batch-size", "2"], "batch_size 1 there, 2 now"),
        (["--threads", "2"], "threads 1 there, 2 now"),
    ],
)
def test_other_settings_are_refused(capsys, begun: Path, model: Path, prompts: Path, more: list[str], says: str) -> None:
    before = content(begun)
    assert run(model, prompts, begun, *more) == 1
    assert says in capsys.readouterr().err
    assert content(begun) == before
    assert run(model, prompts, begun) == 0
    assert f"0 videos made, {len(before)} were there" in capsys.readouterr().out


def test_another_model_is_refused(capsys, begun: Path, prompts: Path, tmp_path: Path) -> None:
    other = tiny_pipeline("wan", tmp_path / "other", seed=1)
    (other / "generation.json").write_text(json.dumps(GENERATION))
    assert run(other, prompts, begun) == 1
    assert "was begun otherwise (begun.json): model " in capsys.readouterr().err


def test_a_folder_without_its_manifest_is_refused(capsys, begun: Path, model: Path, prompts: Path) -> None:
    manifest_path(begun).write_text("{")
    assert run(model, prompts, begun) == 1
    assert "begun.json is damaged" in capsys.readouterr().err
    manifest_path(begun).unlink()
    assert run(model, prompts, begun) == 1
    assert "begun.json is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_a_size_that_the_model_cannot_take_starts_no_process(capsys, model: Path, prompts: Path, tmp_path: Path) -> None:
    assert run(model, prompts, tmp_path / "out", "--processes", "2", "--height", "33") == 1
    assert "height = 33 must be a multiple of 16: 32 or 48" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_error_in_a_process_names_the_prompt(capsys, prompts: Path, tmp_path: Path) -> None:
    fixed = tiny_pipeline("cogvideox", tmp_path / "model")  # its pipeline fixes guidance before the first step
    assert run(fixed, prompts, tmp_path / "out", "--processes", "2", "--guidance-stop", "0.5") == 1
    error = capsys.readouterr().err
    assert "guidance" in error and "'a red digit three'" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--prompt", "a red digit"], "give either --prompt"),
        (["--samples", "0"], "samples = 0 must be at least 1"),
        (["--batch-size", "3"], "batches of 3 do not divide 2 samples"),
        (["--shard", "3/2"], "shard '3/2' must be i/n"),
        (["--shard", "1"], "shard '1' must be i/n"),
        (["--seed", "-1"], "seed -1"),
    ],
)
def test_bad_arguments(capsys, model: Path, prompts: Path, tmp_path: Path, more: list[str], says: str) -> None:
    assert run(model, prompts, tmp_path / "out", *more) == 1
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_options_of_lists_need_a_list(monkeypatch, capsys, model: Path, tmp_path: Path) -> None:
    one = ["--model", str(model), "--prompt", "a red digit", "--out", str(tmp_path / "a.mp4")]
    monkeypatch.setattr(sys, "argv", ["qvgen", "generate", *one, "--batch-size", "2", "--shard", "1/2"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert "--batch-size, --shard: only with --prompts" in capsys.readouterr().err


def test_long_prompts_get_short_names_and_the_manifest_knows_them(model: Path, tmp_path: Path) -> None:
    long, slash, plain = "a red digit three moving up, " * 20, "a red/blue digit", "a green digit"
    listed, out = tmp_path / "prompts.txt", tmp_path / "out"
    for prompts in ((long, plain), (slash, plain)):  # the second list adds to the folder of the first
        listed.write_text("\n".join(prompts))
        assert run(model, listed, out) == 0
    names = json.loads(manifest_path(out).read_text())["names"]
    assert sorted(names.values()) == sorted([long.strip(), slash])
    expected = [f"{stem}-{sample}.mp4" for stem in (*names, plain) for sample in range(SAMPLES)]
    assert sorted(content(out)) == sorted(expected)
