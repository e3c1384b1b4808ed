"""`qvgen generate` on real, small, untrained pipelines: same seed same bytes, and errors that say what to do."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import cli
from qvgen.models.tiny import TINY_CLIP, tiny_pipeline
from qvgen.sampling.settings import read_settings

GENERATION = {
    "frames": TINY_CLIP.frames,
    "height": TINY_CLIP.height,
    "width": TINY_CLIP.width,
    "max_sequence_length": TINY_CLIP.max_sequence_length,
    "inference_steps": 2,
    "guidance_scale": 2.0,
    "fps": 8,
}


def make(family: str, folder: Path) -> Path:
    tiny_pipeline(family, folder)
    (folder / "generation.json").write_text(json.dumps(GENERATION))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("wan", tmp_path_factory.mktemp("pipeline") / "wan")


@pytest.fixture(scope="module")
def cogvideox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("cogvideox", tmp_path_factory.mktemp("pipeline") / "cogvideox")


@pytest.fixture(scope="module")
def wan_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("wan_image", tmp_path_factory.mktemp("pipeline") / "wan_image")


def run(monkeypatch: pytest.MonkeyPatch, model: Path, out: Path, *more: str, prompt: str = "a red digit three") -> int:
    """Exit code of `qvgen generate`, in this process."""
    arguments = ["qvgen", "generate", "--model", str(model), "--prompt", prompt, "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_the_same_seed_gives_the_same_file(monkeypatch, model: Path, tmp_path: Path, suffix: str) -> None:
    first, second, other = (tmp_path / f"{name}{suffix}" for name in ("first", "second", "other"))
    assert run(monkeypatch, model, first, "--seed", "1") == 0
    assert run(monkeypatch, model, second, "--seed", "1") == 0
    assert run(monkeypatch, model, other, "--seed", "2") == 0
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()


def test_the_other_family(monkeypatch, cogvideox: Path, tmp_path: Path) -> None:
    assert run(monkeypatch, cogvideox, tmp_path / "a.gif", "--seed", "1") == 0
    assert run(monkeypatch, cogvideox, tmp_path / "b.gif", "--seed", "1") == 0
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


def test_a_video_from_its_first_frame(monkeypatch, capsys, wan_image: Path, model: Path, tmp_path: Path) -> None:
    from PIL import Image

    pictures = {colour: str(tmp_path / f"{colour}.png") for colour in ("red", "blue")}
    for colour, path in pictures.items():
        Image.new("RGB", (70, 40), colour).save(path)
    assert run(monkeypatch, wan_image, tmp_path / "a.gif", "--seed", "1", "--image", pictures["red"]) == 0
    assert run(monkeypatch, wan_image, tmp_path / "b.gif", "--seed", "1", "--image", pictures["red"]) == 0
    assert run(monkeypatch, wan_image, tmp_path / "c.gif", "--seed", "1", "--image", pictures["blue"]) == 0
    a, b, c = ((tmp_path / f"{name}.gif").read_bytes() for name in "abc")
    assert a == b != c
    out = tmp_path / "refused.gif"
    for folder, more, says in (
        (wan_image, (), "from its first frame: give it with --image FILE"),
        (wan_image, ("--image", str(tmp_path / "none.png")), "none.png does not exist"),
        (wan_image, ("--image", str(wan_image / "model_index.json")), "cannot be read as a video"),
        (model, ("--image", pictures["red"]), "from text alone: leave out --image"),
    ):
        assert run(monkeypatch, folder, out, *more) == 1
        assert says in capsys.readouterr().err and not out.exists()


def test_an_image(monkeypatch, tmp_path: Path) -> None:
    """Of an image model a PNG of the picture alone, magnified as far as small pictures are."""
    from PIL import Image

    folder = tiny_pipeline("pixart", tmp_path / "pixart")
    flags = ("--height", "32", "--width", "48", "--steps", "2", "--max-sequence-length", "8")
    assert run(monkeypatch, folder, tmp_path / "a.png", *flags) == 0
    assert Image.open(tmp_path / "a.png").size == (96, 64)


def test_a_packed_model(monkeypatch, model: Path, tmp_path: Path) -> None:
    import torch

    from qvgen.checkpoint.packed import export_pipeline
    from qvgen.checkpoint.pipeline import load_pipeline
    from qvgen.models.wan import WanFamily
    from qvgen.nn.swap import convert_, prepare_
    from qvgen.quant.scheme import QuantScheme

    transformer, scheme = load_pipeline(model).transformer, QuantScheme()
    prepare_(transformer, scheme, default_targets=WanFamily.default_targets)
    convert_(transformer)
    export_pipeline(model, transformer, scheme, tmp_path / "packed", torch.bfloat16)
    for name in ("a.png", "b.png"):
        assert run(monkeypatch, tmp_path / "packed", tmp_path / name, "--seed", "1") == 0
    assert run(monkeypatch, model, tmp_path / "full.png", "--seed", "1") == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "full.png").read_bytes()


def test_flags_override_generation_json(monkeypatch, model: Path, tmp_path: Path) -> None:
    from PIL import Image

    flags = ["--frames", "5", "--height", "48", "--width", "64", "--steps", "1", "--guidance-scale", "1"]
    assert run(monkeypatch, model, tmp_path / "own.png") == 0
    assert run(monkeypatch, model, tmp_path / "flags.png", *flags) == 0
    assert Image.open(tmp_path / "own.png").size == (9 * 64 + 8 * 4, 64)
    assert Image.open(tmp_path / "flags.png").size == (5 * 128 + 4 * 4, 96)


def test_the_prompt_matters(monkeypatch, model: Path, tmp_path: Path) -> None:
    assert run(monkeypatch, model, tmp_path / "a.png", prompt="a red digit three") == 0
    assert run(monkeypatch, model, tmp_path / "b.png", prompt="a blue digit one") == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("more", "prompt", "name", "says"),
    [
        ([], "  ", "a.mp4", "the prompt is empty"),
        ([], "a", "a.avi", ".mp4, .gif, .png"),
        (["--seed", "-1"], "a", "a.mp4", "seed -1"),
        (["--steps", "0"], "a", "a.mp4", "inference_steps = 0"),
        (["--height", "33"], "a", "a.mp4", "height = 33 must be a multiple of 16: 32 or 48"),
    ],
)
def test_bad_arguments(monkeypatch, capsys, model: Path, tmp_path: Path, more, prompt: str, name: str, says: str) -> None:
    assert run(monkeypatch, model, tmp_path / name, *more, prompt=prompt) == 1
    error = capsys.readouterr().err
    assert error.startswith("qvgen: ") and says in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_folders_that_are_no_pipeline(monkeypatch, capsys, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    assert run(monkeypatch, tmp_path / "nowhere", out) == 1
    assert "does not exist" in capsys.readouterr().err
    assert run(monkeypatch, model / "transformer", out) == 1
    assert "model_index.json does not exist" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "HunyuanVideo15Pipeline"}')
    assert run(monkeypatch, other, out) == 1
    assert "'HunyuanVideo15Pipeline' is not supported" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("truncated", "is cut short"),
        ("header", "is not a safetensors"),
        ("pickle", "is a pickle"),
        ("missing", "missing"),
    ],
)
def test_damaged_weights(monkeypatch, capsys, model: Path, tmp_path: Path, component: str, damage: str, says: str) -> None:
    broken, out = tmp_path / "broken", tmp_path / "a.mp4"
    shutil.copytree(model, broken)
    (weights,) = (broken / component).glob("*.safetensors")
    whole = weights.read_bytes()
    weights.unlink()
    if damage == "truncated":
        weights.write_bytes(whole[:-1000])
    elif damage == "header":
        weights.write_bytes(b"\xff" * 16 + whole[16:])
    elif damage == "pickle":
        weights.with_suffix(".bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    assert run(monkeypatch, broken, out) == 1
    error = capsys.readouterr().err
    assert "qvgen: " in error and says in error and component in error and "Traceback" not in error
    assert not out.exists()


def test_a_model_is_sampled_at_its_own_frame_rate(model: Path, tmp_path: Path) -> None:
    """Without a generation.json, as published models come: Wan 2.2 5B, which has 48 channels, was trained with 24 a second."""
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation.json").unlink()
    assert read_settings(tmp_path).fps == 16
    config = json.loads((tmp_path / "transformer/config.json").read_text())
    (tmp_path / "transformer/config.json").write_text(json.dumps(config | {"in_channels": 48, "out_channels": 48}))
    assert read_settings(tmp_path).fps == 24
    assert read_settings(tmp_path, {"fps": 8}).fps == 8


def test_generation_json_is_checked(monkeypatch, capsys, model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    (copy / "generation.json").write_text('{"frame": 9}')
    assert run(monkeypatch, copy, tmp_path / "a.mp4") == 1
    assert "unknown entries ['frame']; allowed: frames" in capsys.readouterr().err
    (copy / "generation.json").write_text('{"frames": "nine"}')
    assert run(monkeypatch, copy, tmp_path / "a.mp4") == 1
    assert "frames = 'nine'" in capsys.readouterr().err
    (copy / "generation.json").write_text('{"guidance_stop": 1.5}')
    assert run(monkeypatch, copy, tmp_path / "a.mp4") == 1
    assert "guidance_stop = 1.5 must be a number above 0, at most 1" in capsys.readouterr().err


def test_a_model_that_is_meant_to_be_sampled_without_guidance_at_the_end(monkeypatch, model: Path, tmp_path: Path) -> None:
    """As packing writes it for methods with gated guidance; the flag overrides it."""
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    (copy / "generation.json").write_text(json.dumps(GENERATION | {"inference_steps": 5, "guidance_stop": 0.3}))
    gated, whole, asked = (tmp_path / f"{name}.gif" for name in ("gated", "whole", "asked"))
    assert run(monkeypatch, copy, gated) == 0
    assert run(monkeypatch, copy, whole, "--guidance-stop", "1") == 0
    assert run(monkeypatch, model, asked, "--steps", "5", "--guidance-stop", "0.3") == 0
    assert gated.read_bytes() == asked.read_bytes() != whole.read_bytes()


@pytest.mark.slow
def test_as_a_command(model: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user runs it: the path of the file on stdout and nothing else."""
    command = [sys.executable, "-m", "pipelines.cli", "generate", "--model", str(model), "--prompt", "a red digit"]
    files = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for file in files:
        done = subprocess.run([*command, "--out", str(file)], capture_output=True, text=True, check=True)
        assert done.stdout.split() == [str(file)]
    assert files[0].read_bytes() == files[1].read_bytes()
