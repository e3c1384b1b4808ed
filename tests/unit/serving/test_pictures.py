"""Served models that read a first frame, or make images: requests and answers, on two-layer pipelines."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from PIL import Image

from pipelines.commands.generate.video import generate
from qvgen.models.tiny import TINY_CLIP, tiny_pipeline
from qvgen.serving.engine import Engine
from qvgen.serving.pyfunc import Served, signature_of
from qvgen.serving.server import LARGEST_TEXT, _largest_body
from stages.record.model.flavour import make_flavour

PROMPT = "a red digit three"
SETTINGS: dict[str, Any] = {**vars(TINY_CLIP), "inference_steps": 2, "guidance_scale": 2.0, "fps": 8}


def served(folder: Path, family: str, frames: int) -> Served:
    tiny_pipeline(family, folder)
    (folder / "generation.json").write_text(json.dumps(SETTINGS | {"frames": frames}))
    return Served(Engine(folder), family)


@pytest.fixture(scope="module")
def from_frame(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return served(tmp_path_factory.mktemp("from_frame"), "wan_image", TINY_CLIP.frames)


def picture(kind: str = "PNG", size: tuple[int, int] = (50, 40)) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(file, kind)
    return file.getvalue()


def asked(model: Served, image: object, **params: Any) -> Any:
    return model.predict(pandas.DataFrame([{"prompt": PROMPT, "seed": 3, "image": image}]), params)


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_video_from_a_first_frame_is_that_of_generate(from_frame: Served, kind: str, tmp_path: Path) -> None:
    (tmp_path / "first").write_bytes(picture(kind))
    generate(from_frame.engine.folder, PROMPT, 3, tmp_path / "wanted.mp4", image=tmp_path / "first")
    (row,) = asked(from_frame, text(picture(kind))).to_dict("records")
    wanted = (tmp_path / "wanted.mp4").read_bytes()
    assert base64.b64decode(row["video"]) == wanted and row["sha256"] == hashlib.sha256(wanted).hexdigest()


def test_an_image_is_that_of_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVGEN_VIDEOS", str(tmp_path / "kept"))
    model = served(tmp_path / "model", "pixart", 1)
    generate(model.engine.folder, PROMPT, 3, tmp_path / "wanted.png")
    (row,) = asked(model, None, output="path").to_dict("records")
    assert row.keys() == {"image", "sha256"} and row["image"] == str(tmp_path / "kept" / f"{row['sha256']}.png")
    assert Path(row["image"]).read_bytes() == (tmp_path / "wanted.png").read_bytes()
    with pytest.raises(ValueError, match="reads no image: leave it out"):
        asked(model, text(picture()))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (None, "makes a video from its first frame: give it as image"),
        ("", "makes a video from its first frame: give it as image"),
        ("data:image/png;base64,AAAA", "as base64, without a prefix"),
        (text(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"), "must be one of PNG, JPEG, WEBP"),
        (text(b"ffconcat version 1.0\nfile /etc/passwd\n"), "must be one of PNG, JPEG, WEBP"),
        (text(picture("GIF")), "must be one of PNG, JPEG, WEBP"),
        (text(picture()[:60]), "^the image"),
        (text(b"x" * (8 << 20) + b"x"), "limit image_bytes = 8388608: an image of 8388609"),
    ],
)
def test_what_is_no_first_frame(from_frame: Served, image: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        asked(from_frame, image)


@pytest.mark.parametrize("row", [{"prompt": None}, {"prompt": 5}, {"seed": 1.5}, {"seed": float("inf")}])
def test_a_row_of_other_kinds(from_frame: Served, row: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="prompt must be text and seed a whole number"):
        from_frame.predict(pandas.DataFrame([{"prompt": PROMPT, "image": text(picture())} | row]), {})


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_more_pixels_than_a_screen(from_frame: Served) -> None:
    file = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(file, "PNG")  # 18 KB
    with pytest.raises(ValueError, match=r"^the image: a frame has 12000 x 12000 pixels, more than"):
        asked(from_frame, text(file.getvalue()))


def test_bodies_have_room_for_images(from_frame: Served) -> None:
    assert _largest_body(from_frame.engine) == LARGEST_TEXT + 4 * (8 << 20) * 4 // 3
    assert len(text(b"x" * (8 << 20))) * 4 <= _largest_body(from_frame.engine)


@pytest.mark.parametrize(
    ("task", "inputs", "makes"),
    [
        ("image-to-video", ["prompt", "negative_prompt", "seed", "image"], "video"),
        ("text-to-image", ["prompt", "negative_prompt", "seed"], "image"),
    ],
)
def test_what_mlflow_says_of_it(task: str, inputs: list[str], makes: str) -> None:
    about = {
        "name": "a",
        "settings": SETTINGS,
        "files": {},
        "constraints": "",
        "prompt": PROMPT,
        "task": task,
        "licence": "mit",
    }
    files = make_flavour(about)
    signature = signature_of(SETTINGS, task == "image-to-video", makes)
    assert [column.name for column in signature.inputs] == inputs
    assert [column.name for column in signature.outputs] == [makes, "sha256"]
    assert f'"name": "{makes}"' in files["MLmodel"] and ("image_bytes" in files["MLmodel"])
    (example,) = json.loads(files["input_example.json"])["data"]
    assert len(example) == len(inputs)
    if task == "image-to-video":
        assert Image.open(io.BytesIO(base64.b64decode(example[3]))).size == (16, 16)
