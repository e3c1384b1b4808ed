"""A registered model loaded by MLflow alone, and served by a real `mlflow models serve`: the bytes of `qvgen generate`."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from mlflow import MlflowClient

from tests.support.fresh_venv import Installed
from tests.support.invocations import ask, post
from tests.support.packed_model import make_packed
from tests.support.registered import outside, packed_wish, register, using
from tests.support.services import free_port, server

pytestmark = [pytest.mark.integration, pytest.mark.slow]

NAME = "served"
PROMPT = "a red digit three"


@pytest.fixture(scope="module")
def packed(mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed folder, registered under NAME."""
    folder = tmp_path_factory.mktemp("packed")
    make_packed(folder)
    register(MlflowClient(mlflow_server), packed_wish(folder, NAME))
    return folder / "packed"


def generated(packed: Path, out: Path, seed: int = 1, prompt: str = PROMPT, **overrides: Any) -> bytes:
    from pipelines.commands.generate.video import generate

    generate(packed, prompt, seed, out, **overrides)
    return out.read_bytes()


def test_what_mlflow_says_of_it(packed: Path, mlflow_server: str, tmp_path: Path) -> None:
    from mlflow.models import get_model_info

    with using(mlflow_server, tmp_path):
        info = get_model_info(f"models:/{NAME}@challenger")
    assert [column["name"] for column in info.signature.inputs.to_dict()] == ["prompt", "negative_prompt", "seed"]
    defaults = {spec.name: spec.default for spec in info.signature.params}
    assert defaults["steps"] == 2 and defaults["output"] == "base64" and defaults["frames"] == 9
    assert info.metadata["card"] == "artifacts/packed/README.md" and info.metadata["limits"]["steps"] == 10
    assert "cloudpickle" not in yaml.safe_dump(info.flavors["python_function"]["env"])


def test_predict_gives_the_bytes_of_generate(fresh: Installed, packed: Path, mlflow_server: str, tmp_path: Path) -> None:
    """In another process, from an empty folder, without checkout, git and DVC."""
    code = f"""
import importlib.util, json, mlflow, pandas
assert importlib.util.find_spec("pipelines") is None and importlib.util.find_spec("stages") is None
model = mlflow.pyfunc.load_model("models:/{NAME}@challenger")
table = pandas.DataFrame([{{"prompt": "{PROMPT}", "seed": 1}}, {{"prompt": "{PROMPT}", "seed": 2}}])
first = model.predict(table)
second = model.predict(pandas.DataFrame([{{"prompt": "{PROMPT}", "negative_prompt": "blue", "seed": 1}}]),
                       params={{"steps": 3, "output": "path"}})
open("out.json", "w").write(json.dumps([first["video"].tolist(), open(second["video"][0], "rb").read().hex()]))
"""
    folder = tmp_path / "empty"
    folder.mkdir()
    variables = outside(fresh.venv, tmp_path, mlflow_server) | {"QVGEN_VIDEOS": str(tmp_path / "videos")}
    done = subprocess.run([fresh.python, "-c", code], cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (first, second), kept = json.loads((folder / "out.json").read_text())
    assert base64.b64decode(first) == generated(packed, tmp_path / "1.mp4")
    assert base64.b64decode(second) == generated(packed, tmp_path / "2.mp4", seed=2)
    wanted = generated(packed, tmp_path / "3.mp4", inference_steps=3, negative_prompt="blue")
    assert bytes.fromhex(kept) == wanted != base64.b64decode(first)


@pytest.fixture(scope="module")
def address(fresh: Installed, packed: Path, mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of `mlflow models serve`, with room for two requests that wait."""
    folder = tmp_path_factory.mktemp("serve")
    port = free_port()
    variables = outside(fresh.venv, folder, mlflow_server) | {"QVGEN_WAITING": "2"}
    command = [str(fresh.venv / "bin" / "mlflow"), "models", "serve", "-m", f"models:/{NAME}@challenger"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--env-manager", "local"]
    found = f"http://127.0.0.1:{port}"
    with server(command, folder / "run", f"{found}/ping", variables, alone=True):
        yield found


def test_eight_requests_at_once(address: str, packed: Path, tmp_path: Path) -> None:
    """Each gets its own video, the one that it would get alone, or is told to come again."""
    seeds = [0, 1, 2, 3, 0, 1, 2, 3]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: ask(address, seed=seed, steps=10)[:2], seeds))
    videos = {seed: generated(packed, tmp_path / f"{seed}.mp4", seed, inference_steps=10) for seed in range(4)}
    wanted = {seed: hashlib.sha256(video).hexdigest() for seed, video in videos.items()}
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 503} and statuses.count(200) >= 3, answers
    for seed, (status, answer) in zip(seeds, answers, strict=True):
        if status == 200:
            assert answer["predictions"][0]["sha256"] == wanted[seed]
        else:
            assert "limit waiting = 2" in answer


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"steps": 1000}, "limit steps = 10: 1000 asked for"),
        ({"frames": 81, "height": 480, "width": 832}, "limit pixels"),
        ({"height": 16, "steps": 0}, "inference_steps = 0"),
        ({"prompt": "x" * 3000}, "limit characters = 2000"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"seed": -1}, "seed -1 must lie between"),
        ({"output": "/etc/passwd"}, "output = '/etc/passwd' must be one of"),
    ],
)
def test_what_is_too_large_or_wrong_is_refused_by_name(address: str, asked: dict[str, Any], said: str) -> None:
    status, answer, _ = ask(address, **asked)
    assert status == 400 and said in answer


def test_malformed_and_cancelled(address: str) -> None:
    """Neither takes the server from the others."""
    assert post(address, b"{").status == 400
    assert post(address, b'{"dataframe_split": {"columns": ["text"], "data": [["a"]]}}').status == 400
    parts = urlsplit(address)
    for _ in range(2):  # the line is cut while the video is made
        with socket.create_connection((parts.hostname, parts.port)) as line:
            body = json.dumps({"dataframe_split": {"columns": ["prompt"], "data": [[PROMPT]]}, "params": {"steps": 10}})
            head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            line.sendall(f"{head}\r\n\r\n{body}".encode())
    status, answer, _ = ask(address)
    assert status == 200 and base64.b64decode(answer["predictions"][0]["video"])[4:8] == b"ftyp"


def test_mlflow_models_predict(fresh: Installed, packed: Path, mlflow_server: str, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps({"dataframe_split": {"columns": ["prompt"], "data": [[PROMPT]]}}))
    variables = outside(fresh.venv, tmp_path, mlflow_server)
    command = [str(fresh.venv / "bin" / "mlflow"), "models", "predict", "-m", f"models:/{NAME}/1", "--env-manager", "local"]
    command += ["-i", "in.json", "-o", "out.json", "-t", "json"]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads((tmp_path / "out.json").read_text())["predictions"]
    assert base64.b64decode(answer["video"]) == generated(packed, tmp_path / "0.mp4", seed=0)
