"""Folders, parameters, captions and configurations with random damage: read, or refused with a sentence. Never a traceback."""

from __future__ import annotations

import json
import random
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from qvgen.checkpoint.loadable import check_loadable
from qvgen.checkpoint.packed import export_pipeline, verify_folder
from qvgen.checkpoint.pipeline import load_transformer
from qvgen.data.captions import read_captions
from qvgen.data.videos import read_clip
from qvgen.models.family import ClipSize
from qvgen.models.registry import load_family
from qvgen.models.source import check_links, read_pipeline
from qvgen.nn.swap import convert_, prepare_
from qvgen.params import load_params
from qvgen.quant.scheme import QuantArgs, QuantScheme
from qvgen.sampling.settings import read_settings

ROOT = Path(__file__).parents[2]
SECONDS = 12.0  # for each of the four kinds of input
SLOWEST = 10.0  # seconds that one input may take
SIZE = ClipSize(frames=5, height=32, width=32, max_sequence_length=16)
VALUES: list[Any] = [
    None, True, "", "x", "../x", "\0", "\ud800", -1, 0, 1.5, 2**31, 2**33, 2**64, 10**400, 1e308, float("nan"), float("inf"),
    [], [[]], {}, {"a": []}, [None], ["re:(a+)+$"], "re:(\\w|[a-z]|bl)+\\d$", "9" * 5000, "x" * 100_000,
]  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = ROOT / "assets/tiny-wan"
    transformer = load_transformer(source)
    scheme = QuantScheme(weights=QuantArgs(num_bits=4, zero_point_domain="float"), timestep_groups=4)
    prepare_(transformer, scheme, default_targets=load_family(source).default_targets)
    convert_(transformer)
    folder = tmp_path_factory.mktemp("packed") / "model"
    export_pipeline(source, transformer, scheme, folder, torch.bfloat16)
    return folder


def damage_value(tree: Any, chance: random.Random) -> Any:
    """The tree with one value or key of it changed, removed or added, at a random depth."""
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
        if not keys:
            return chance.choice(VALUES)
        key = chance.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and chance.random() < 0.6:
            node = node[key]
            continue
        what = chance.random()
        if what < 0.75:
            node[key] = chance.choice(VALUES)
        elif what < 0.9:
            del node[key]
        elif isinstance(node, dict):
            node[chance.choice(["x", "_x", "num_layers", ""])] = chance.choice(VALUES)
        return tree


def damage_bytes(content: bytes, chance: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        what = chance.random()
        if what < 0.4 and at < len(data):
            data[at] = chance.randrange(256)
        elif what < 0.6:
            del data[at : at + chance.randint(1, 200)]
        elif what < 0.8:
            data[at:at] = chance.choice(
                [b"\0", b"\xff\xfe", b"[" * 20_000, b"{" * 3000, b'"', b"\n", b"&a *a", b"\xe9", b"? [a]: "]
            )
        else:
            data[at:at] = data[: chance.randint(0, 100)]
    return bytes(data)


def damage_file(path: Path, chance: random.Random) -> None:
    if path.suffix == ".json" and chance.random() < 0.7:
        path.write_text(json.dumps(damage_value(json.loads(path.read_bytes()), chance)))
    else:
        path.write_bytes(damage_bytes(path.read_bytes(), chance))


def survive(read: Callable[[], object], make: Callable[[random.Random], object], name: str) -> None:
    """Damage and read, with seeds from 0 on, until the time is over. Fails with whatever was raised and was no sentence."""
    began, seed, refused, faults = time.monotonic(), 0, 0, []
    while time.monotonic() - began < SECONDS and len(faults) < 5:
        made = make(random.Random(f"{name} {seed}"))
        at = time.monotonic()
        try:
            read()
        except ValueError as error:  # as the command line shows it: one sentence
            refused += 1
            if not str(error).strip() or len(str(error)) > 20_000 or isinstance(error, UnicodeError | json.JSONDecodeError):
                faults.append(f"seed {seed}, {made}: says {type(error).__name__}: {str(error)[:300]!r}")
        except Exception as error:
            faults.append(
                f"seed {seed}, {made}: {type(error).__name__}\n{''.join(traceback.format_exception(error)[-6:])[-1500:]}"
            )
        if (took := time.monotonic() - at) > SLOWEST:
            faults.append(f"seed {seed}, {made}: took {took:.0f} s")
        seed += 1
    assert not faults, "\n".join(faults)
    assert refused > 5, f"only {refused} of {seed} were damaged enough"


@pytest.mark.slow
def test_params(tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "params.yaml"
    whole = (ROOT / "params.yaml").read_bytes()

    def make(chance: random.Random) -> str:
        if chance.random() < 0.5:
            path.write_text(yaml.safe_dump(damage_value(yaml.safe_load(whole), chance)))
        else:
            path.write_bytes(damage_bytes(whole, chance))
        return "params.yaml"

    survive(lambda: load_params(path), make, "params")


def test_captions_and_clips(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "whole.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for index in range(SIZE.frames):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 40 * index, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    whole, table = (tmp_path / "whole.mp4").read_bytes(), b'file,caption\na.mp4,"a ball, red"\na.mp4,a dog\n'

    def make(chance: random.Random) -> str:
        clip = chance.random() < 0.5
        (tmp_path / "captions.csv").write_bytes(table if clip else damage_bytes(table, chance))
        (tmp_path / "a.mp4").write_bytes(damage_bytes(whole, chance) if clip else whole)
        return "a.mp4" if clip else "captions.csv"

    survive(lambda: [read_clip(path, SIZE, fps) for fps in (None, 8) for path, _ in read_captions(tmp_path)], make, "captions")


def folder_maker(source: Path, folder: Path) -> Callable[[random.Random], str]:
    """Damages one file of a fresh copy of `source`: a small one mostly."""
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.suffix in (".json", ".safetensors"))

    def make(chance: random.Random) -> str:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        name = chance.choice([*names, *(name for name in names if name.endswith("config.json"))])
        damage_file(folder / name, chance)
        return name

    return make


@pytest.mark.slow
def test_sources(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def read() -> None:
        pipeline = read_pipeline(folder)
        check_links(pipeline)
        check_loadable(pipeline)
        read_settings(folder)

    survive(read, folder_maker(ROOT / "assets/tiny-wan", folder), "sources")


@pytest.mark.slow
def test_packed_folders(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def read() -> None:
        read_settings(folder)
        verify_folder(folder)

    survive(read, folder_maker(packed, folder), "packed")


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"frames": 10**9 + 1}, "pixels, more than 1073741824"),
        ({"inference_steps": 10**9}, "inference_steps = 1000000000 must be a number, at least 1, at most 1000"),
        ({"height": 2**33, "width": 2**33}, "more than 1073741824"),
    ],
)
def test_settings_that_no_machine_can_meet(packed: Path, tmp_path: Path, entries: dict[str, int], said: str) -> None:
    folder = shutil.copytree(packed, tmp_path / "model")
    path = folder / "generation.json"
    own = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(own | entries))
    with pytest.raises(ValueError, match=said):
        read_settings(folder)


@pytest.mark.parametrize("weight_map", [{"a": ["x"]}, ["x"], {"a": "../x.safetensors"}, None, {"a": {"b": 1}}], ids=str)
def test_an_index_names_files_beside_it(tmp_path: Path, weight_map: Any) -> None:
    folder = shutil.copytree(ROOT / "assets/tiny-wan", tmp_path / "model")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"weight_map must map|is not the name of a file beside it"):
        read_pipeline(folder)


@pytest.mark.parametrize(("width", "height"), [(8192, 4112), (16384, 16)])
def test_a_small_file_of_large_frames(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuvj420p"
        container.mux(stream.encode(av.VideoFrame(width, height, "yuvj420p")))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match="pixels, more than 33554432"):
        read_clip(path, ClipSize(frames=1, height=1024, width=1024, max_sequence_length=16))
