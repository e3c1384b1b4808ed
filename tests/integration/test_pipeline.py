"""The whole pipeline through real `dvc repro` on two-layer models: kill -9, resume, same bytes, both families.

Training stages are killed while they run; what they leave must be what an uninterrupted run leaves, bit for bit.
"""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from qvgen.checkpoint.packed import verify_folder
from qvgen.checkpoint.unpack import unpack_folder
from qvgen.evaluation.quality.canary import check_canary
from qvgen.models.hashes import hash_files
from qvgen.models.registry import load_family
from qvgen.models.source import read_pipeline
from qvgen.models.tiny import TINY_CLIP, TINY_IMAGE, tiny_pipeline
from qvgen.sampling.video import write_video
from tests.support.families import KINDS
from tests.support.stages_in_process import TO_PACK, run_stages
from tests.support.toy_project import start, wait_until

ROOT = Path(__file__).parents[2]
SECONDS = 600  # limit of one `dvc repro`; minutes on two busy cores
STEPS, PHASE, FINAL = 80, 20, 30  # of training, long enough to be killed in
CAPTIONS = ("a red digit three moving up", "a blue digit two moving down", "a green digit one moving left")

pytestmark = [pytest.mark.slow, pytest.mark.integration]


def make_project(folder: Path, family: str, processes: int = 1) -> Path:
    """A checkout of the pipeline whose model has two layers and whose data are nine short videos."""
    for name in ("stages", "qvgen"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", folder)
    kind = KINDS[family]
    options = {"rotary": True} if family == "cogvideox" else kind.options
    model = tiny_pipeline(kind.family, folder / "assets/tiny-wan", **options)
    recorded = {name: file.sha256 for name, file in hash_files(model, read_pipeline(model).files).items()}
    (model / "sha256.json").write_text(json.dumps(recorded))
    videos, generator = folder / "videos", torch.Generator().manual_seed(0)
    videos.mkdir()
    rows = [("file", "caption")]
    for i in range(9):
        noise = torch.rand(3, TINY_CLIP.frames, 4, 4, generator=generator).repeat_interleave(8, -1).repeat_interleave(8, -2)
        name = f"{i}.png" if kind.clip.frames == 1 and i % 2 else f"{i}.mp4"  # of an image model pictures, too
        write_video(videos / name, noise * 2 - 1)
        rows.append((name, CAPTIONS[i % 3]))
    with (videos / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)

    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    clip = {k: getattr(kind.clip, k) for k in ("frames", "height", "width", "max_sequence_length")}
    parts = {"train_clips": 4, "calibration_clips": 3, "held_out_clips": 2}
    params["prepare"] |= {"source": "videos", "folder": "videos", "fps": 8, **clip, **parts}
    params["scheme"]["timestep_groups"] = 3
    params["qat"] |= {"steps": STEPS, "batch_size": 2, "checkpoint_every": 10}
    params["decay"] |= {"initial_rank": 4, "phase_steps": PHASE, "final_steps": FINAL}
    (folder / "prompts.txt").write_text("a red digit three moving left\n")
    own = {"prompts_file": "prompts.txt"}
    params["evaluate"] |= {"prompts": 2, "inference_steps": 2, "velocity_timesteps": 2, "videos": 1, **own}
    params["benchmark"] |= {"repetitions": 3}
    params["compute"]["processes"] = processes
    write_params(folder, params)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=folder, check=True)
    return folder


def write_params(folder: Path, params: dict) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def dvc(folder: Path, *args: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", *args],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def repro(folder: Path, *args: str) -> str:
    process = dvc(folder, "repro", *args)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output
    return output


def repro_and_kill(folder: Path, stage: str, checkpoints: int) -> None:
    """Start `dvc repro pack` and kill its whole process group once `stage` has written its n-th checkpoint."""
    process = dvc(folder, "repro", "pack")
    deadline, seen = time.monotonic() + SECONDS, set()
    while len(seen) < checkpoints or not running(folder, stage):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        for state in (folder / ".qvgen/ckpt").glob("*/state.safetensors"):
            try:
                seen.add((state.parent.name, state.stat().st_mtime_ns))
            except FileNotFoundError:  # the stage has just finished
                continue
        if not running(folder, stage):
            seen.clear()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def running(folder: Path, stage: str) -> bool:
    """Whether the stage is the one at work: those before it have left their outputs."""
    before = {"qat": "artifacts/calibration", "decay": "artifacts/qat"}[stage]
    return (folder / before).exists() and not (folder / "artifacts" / stage).exists()


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def curve(folder: Path, stage: str) -> list[tuple[str, ...]]:
    """Step, loss, gradient norm and rank of every step: all that does not depend on the clock."""
    with (folder / f"metrics/{stage}.csv").open() as file:
        return [(r["step"], r["loss"], r["gradient_norm"], r["rank"]) for r in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan project run to the end without interruption, trained by two processes."""
    folder = make_project(tmp_path_factory.mktemp("whole"), "wan", processes=2)
    repro(folder)
    return folder


def not_trained_yet(finished: Path, folder: Path) -> Path:
    """A copy of a finished project that stands before qat, and whose DVC does not remember that it ever ran."""
    shutil.copytree(finished, folder)
    lock = yaml.safe_load((folder / "dvc.lock").read_text())
    for stage in ("qat", "decay", "pack"):
        del lock["stages"][stage]
        shutil.rmtree(folder / "artifacts" / {"pack": "packed"}.get(stage, stage))
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock))
    shutil.rmtree(folder / ".dvc/cache/runs")
    return folder


def test_kill_9_and_resume_equals_uninterrupted(finished: Path, tmp_path: Path) -> None:
    folder = not_trained_yet(finished, tmp_path / "killed")
    repro_and_kill(folder, "qat", checkpoints=3)
    repro_and_kill(folder, "decay", checkpoints=2)
    output = repro(folder, "pack")
    assert "decay: continues at step" in output
    assert curve(folder, "qat") == curve(finished, "qat")
    assert curve(folder, "decay") == curve(finished, "decay")
    assert [int(row[0]) for row in curve(folder, "qat") + curve(folder, "decay")] == list(range(STEPS + 3 * PHASE + FINAL))
    assert hashes(folder / "artifacts/decay") == hashes(finished / "artifacts/decay")
    assert hashes(folder / "artifacts/packed") == hashes(finished / "artifacts/packed")

    # A changed parameter starts fresh, whatever checkpoint an interrupted run has left.
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["qat"] |= {"learning_rate": 1e-3, "steps": STEPS + 1}
    shutil.rmtree(folder / "artifacts/qat")
    shutil.rmtree(folder / "artifacts/decay")
    write_params(folder, params)
    repro_and_kill(folder, "qat", checkpoints=2)
    params["qat"]["learning_rate"] = 2e-3
    write_params(folder, params)
    assert "continues at step" not in repro(folder, "qat")


def test_processes_share_evaluate_and_one_is_killed(finished: Path, tmp_path: Path) -> None:
    """Bit for bit what one process gives; the one that helps is killed at work and started again."""
    folder = tmp_path / "shared"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("cache", "journal", "qat", "decay"), symlinks=True)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["evaluate"] |= {"prompts": 4, "batch_size": 1, "inference_steps": 20}
    write_params(folder, params)
    run_stages(folder, "evaluate")
    expected = hashes(folder / "artifacts/evaluation"), (folder / "metrics/evaluate.json").read_bytes()
    shutil.rmtree(folder / "artifacts/evaluation")
    shutil.rmtree(folder / ".qvgen/ckpt")

    def made() -> set[Path]:
        """By the process with RANK=1."""
        return set((folder / ".qvgen/ckpt").rglob("*-0000[1357].safetensors"))

    helper = share_evaluate(folder, rank=1)
    wait_until(made)
    helper.kill()
    helper.communicate()
    assert 0 < len(made()) < 2 * (2 + 2), "its half of all: of two models 4 videos, and 2 clips at 2 timesteps"
    processes = [share_evaluate(folder, rank) for rank in range(2)]
    said = [process.communicate(timeout=SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "share 2 of 2" in said[1]
    assert (hashes(folder / "artifacts/evaluation"), (folder / "metrics/evaluate.json").read_bytes()) == expected


def share_evaluate(folder: Path, rank: int) -> subprocess.Popen[str]:
    return start(folder, "stages.evaluate", RANK=f"{rank}", WORLD_SIZE="2", OMP_NUM_THREADS="1", PYTHONPATH=str(folder))


def test_metrics_have_the_promised_keys(finished: Path) -> None:
    metrics = {p.stem: json.loads(p.read_text()) for p in (finished / "metrics").glob("*.json")}
    # Videos of one's own: no judge says what they show, and the gate is told so.
    assert metrics["evaluate"].keys() == {"full_precision", "packed", "prompts", "not_applicable"}
    assert set(metrics["evaluate"]["not_applicable"].split()) == {"colour", "direction", "digit"}
    assert metrics["evaluate"]["full_precision"] == {}
    assert metrics["evaluate"]["packed"].keys() == {"psnr_db", "ssim", "velocity_mse", "latent_mse"}
    assert metrics["evaluate"]["prompts"] == 2
    assert {"bytes", "step_ms", "peak_rss_mb", "kernel", "device"} <= metrics["benchmark"].keys()
    for key in ("bytes", "step_ms", "peak_rss_mb"):
        assert metrics["benchmark"][key].keys() == {"fp32", "bf16", "packed"}
    assert metrics["baselines"].keys() == {"rtn", "mse"}
    assert metrics["qat"]["steps"] == STEPS and metrics["decay"]["steps"] == 3 * PHASE + FINAL
    assert metrics["decay"]["final_loss"] < metrics["qat"]["final_loss"]
    (video,) = (finished / "artifacts/evaluation").glob("*.mp4")
    assert video.stem == "00-a-red-digit-three-moving-left"  # no caption, but the line of evaluate.prompts_file


def test_the_model_that_dvc_made_is_the_one_that_was_measured(finished: Path) -> None:
    """evaluate, benchmark and register depend on artifacts/packed by its hash."""
    lock = yaml.safe_load((finished / "dvc.lock").read_text())["stages"]
    (packed,) = [out["md5"] for out in lock["pack"]["outs"] if out["path"] == "artifacts/packed"]
    for stage in ("evaluate", "benchmark", "register"):
        (used,) = [dep["md5"] for dep in lock[stage]["deps"] if dep["path"] == "artifacts/packed"]
        assert used == packed


def test_a_second_run_does_nothing(finished: Path) -> None:
    before = hashes(finished / "artifacts")
    output = repro(finished)
    assert "Running stage" in output  # observe, always
    assert output.count("Running stage") == 1 and "Running stage 'stages/dvc.yaml:observe'" in output
    assert hashes(finished / "artifacts") == before


def test_changed_videos_and_prompts_are_seen(finished: Path) -> None:
    """They stand in params.yaml: DVC sees them through what stage observe writes. A touched file is the same file."""
    video, prompts = finished / "videos/0.mp4", finished / "prompts.txt"
    whole = video.read_bytes(), prompts.read_bytes()

    def observed() -> str:
        repro(finished, "stages/dvc.yaml:observe")
        output, _ = dvc(finished, "status", "prepare", "fetch", "evaluate", "baselines").communicate(timeout=SECONDS)
        return output

    try:
        os.utime(video)
        os.utime(prompts)
        assert "inputs" not in observed()
        video.write_bytes(whole[0][:-1] + bytes([whole[0][-1] ^ 1]))
        said = observed()
        assert "inputs.prepare" in said and "inputs.fetch" not in said and "inputs.evaluate" not in said
        prompts.write_text("a blue digit\n")
        assert observed().count("inputs.evaluate") == 2  # evaluate, baselines
    finally:
        video.write_bytes(whole[0])
        prompts.write_bytes(whole[1])
    assert "inputs" not in observed()


def test_tampered_and_truncated_inputs_stop_the_pipeline_and_lose_nothing(finished: Path) -> None:
    packed = hashes(finished / "artifacts/packed")
    model = hashes(finished / "artifacts/model")
    weights = finished / "assets/tiny-wan/transformer/diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    tampered = whole[:-1] + bytes([whole[-1] ^ 1])
    try:
        for damaged, expected in ((whole[:-8], str(len(whole))), (tampered, "sha256")):
            weights.write_bytes(damaged)
            process = dvc(finished, "repro", "--force", "--single-item", "fetch")
            output, _ = process.communicate(timeout=SECONDS)
            assert process.returncode != 0
            assert "diffusion_pytorch_model.safetensors" in output and expected in output
            assert hashes(finished / "artifacts/model") == model
            assert hashes(finished / "artifacts/packed") == packed
    finally:
        weights.write_bytes(whole)


@pytest.mark.parametrize(("method", "family"), [("svdquant", "wan"), ("viditq", "cogvideox")])
def test_a_method_with_a_scheme_of_its_own_goes_through_the_same_stages(method: str, family: str, tmp_path: Path) -> None:
    folder = make_project(tmp_path / method, family)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["method"] = method
    if method == "viditq":
        params["scheme"]["input_rotation"] = 4  # 128 does not divide what is 12 wide
    write_params(folder, params)
    run_stages(folder, *TO_PACK, "evaluate", "baselines")
    config = json.loads((folder / "artifacts/packed/transformer/config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["input_scaling"] is True
    assert method in (folder / "artifacts/packed/README.md").read_text()
    # The baselines stay what they are: plain schemes, on grids searched for them.
    assert (folder / "artifacts/calibration/mse.safetensors").exists()
    scores = {p.stem: json.loads(p.read_text()) for p in (folder / "metrics").glob("*.json")}
    assert scores["baselines"].keys() == {"rtn", "mse"}
    assert scores["decay"]["steps"] == 0
    # Random weights have no outliers to gain by; that far off is what a transformation not undone would not be.
    assert 0 < scores["evaluate"]["packed"]["velocity_mse"] < 1.5 * scores["baselines"]["rtn"]["velocity_mse"]


@pytest.mark.parametrize(("method", "family"), [("qvgen+", "cogvideox"), ("dsa", "wan")])
def test_a_trained_method_goes_through_the_same_stages(method: str, family: str, tmp_path: Path) -> None:
    """Folded inputs and gated guidance cross from stage to stage in files."""
    folder = make_project(tmp_path / "project", family)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["method"] = method
    params["qat"]["steps"], params["decay"] = 4, params["decay"] | {"phase_steps": 2, "final_steps": 6}
    write_params(folder, params)
    run_stages(folder, *TO_PACK, "evaluate")
    scores = json.loads((folder / "metrics/evaluate.json").read_text())["packed"]
    assert scores["psnr_db"] > 5 and scores["velocity_mse"] > 0
    assert (folder / "artifacts/calibration/mse.safetensors").exists() == (method == "qvgen+")
    sidecar = folder / "artifacts/packed/generation.json"
    stop = json.loads(sidecar.read_text()).get("guidance_stop") if sidecar.exists() else None
    assert stop == (0.8 if method == "dsa" else None)  # CogVideoX's pipeline cannot stop guidance, which qvgen+ would


@pytest.mark.parametrize(
    "family", ["cogvideox", "wan_image", "ltx", "pixart", "flux", "hunyuan_video", "sana", "qwen_image", "stable_diffusion_3"]
)
def test_other_families_go_through_the_same_stages(family: str, tmp_path: Path) -> None:
    folder = make_project(tmp_path / family, family)
    short(folder)
    told = getattr(load_family(folder / "assets/tiny-wan"), "guidance_scale", None)
    if told is not None:
        with pytest.raises(ValueError, match=rf"evaluate.guidance_scale = 3, but .* tell the transformer {told:g}"):
            run_stages(folder, "fetch", "prepare")
        params = yaml.safe_load((folder / "params.yaml").read_text())
        params["evaluate"]["guidance_scale"] = told
        write_params(folder, params)
    run_stages(folder, *TO_PACK, "evaluate", *(["baselines", "benchmark"] if family == "wan_image" else []))
    scores = json.loads((folder / "metrics/evaluate.json").read_text())["packed"]
    assert scores["psnr_db"] > 5 and scores["velocity_mse"] > 0
    canary = json.loads((folder / "artifacts/evaluation/canary/canary.json").read_text())
    assert len(canary.get("images", [])) == (2 if family == "wan_image" else 0)
    again = check_canary(folder / "artifacts/packed", folder / "artifacts/evaluation/canary", tmp_path)
    assert again.ok and again.equal == again.videos == 2
    moves = json.loads((folder / "artifacts/evaluation/details.json").read_text())["packed"]
    assert moves.keys() == (set() if KINDS[family].clip == TINY_IMAGE else {"motion", "flicker"})


def short(folder: Path, **fetch: str) -> None:
    """A few steps of training, and changes to section fetch."""
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["fetch"] |= fetch
    params["qat"]["steps"], params["decay"] = 4, params["decay"] | {"phase_steps": 2, "final_steps": 2}
    write_params(folder, params)


def test_two_experts_one_after_the_other(tmp_path: Path) -> None:
    """Wan 2.2 A14B: a run packs one transformer and keeps the other; a second run starts from what it left."""
    folder = make_project(tmp_path / "project", "wan_experts")
    short(folder)
    with pytest.raises(ValueError, match=r"two transformers.* set fetch.expert to transformer or transformer_2"):
        run_stages(folder, "fetch")
    full = {name: hashes(folder / "assets/tiny-wan" / name) for name in ("transformer", "transformer_2")}
    short(folder, expert="transformer_2")
    run_stages(folder, *TO_PACK, "evaluate", "baselines", "benchmark")
    packed = folder / "artifacts/packed"
    assert hashes(packed / "transformer") == full["transformer"] and hashes(packed / "transformer_2") != full["transformer_2"]
    details = json.loads((folder / "artifacts/evaluation/details.json").read_text())
    assert list(details["velocity_mse_by_timestep"]) == ["125.0", "375.0"]  # of the levels below 0.5
    sizes = json.loads((folder / "metrics/benchmark.json").read_text())["bytes"]
    assert sizes["packed"] == sum(path.stat().st_size for path in (packed / "transformer_2").iterdir())
    assert sizes["bf16"] < sizes["fp32"]

    assert verify_folder(packed) == unpack_folder(packed, tmp_path / "plain", torch.float32) == 20
    assert hashes(tmp_path / "plain/transformer") == full["transformer"]

    second = tmp_path / "second"
    shutil.copytree(folder, second, ignore=shutil.ignore_patterns("artifacts", "metrics", ".qvgen"))
    shutil.copytree(packed, second / "first")
    short(second, source="first", expert="transformer")
    run_stages(second, *TO_PACK, "evaluate")
    both = second / "artifacts/packed"
    assert hashes(both / "transformer_2") == hashes(packed / "transformer_2")
    assert hashes(both / "transformer") != full["transformer"]
    assert verify_folder(both) == 2 * 20
    assert json.loads((second / "metrics/evaluate.json").read_text())["packed"]["velocity_mse"] > 0
    short(second, source="first", expert="transformer_2")
    with pytest.raises(ValueError, match="already quantized by this project"):
        run_stages(second, "fetch")
