"""Stage prepare on real files, some of which cannot be read: what it leaves out, and how it goes on after a stop."""

import csv
import json
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml

from qvgen.data.latents import LatentDataset
from qvgen.data.shards import ShardWriter
from qvgen.models.tiny import TINY_CLIP, tiny_pipeline
from qvgen.models.wan import WanFamily
from qvgen.params import validate_params
from qvgen.sampling.video import write_video
from qvgen.share import ALONE, Share
from stages import prepare
from stages.runtime.outputs import write_whole
from stages.runtime.run import Progress
from tests.support.services import s3

ROOT = Path(__file__).parents[3]
GOOD, BAD = 7, ("corrupt.mp4", "short.mp4")

pytestmark = pytest.mark.slow


class FakeStage:
    """What stage prepare asks of a stage, without DVC and MLflow."""

    def __init__(self, root: Path, share: Share = ALONE, **changes: Any) -> None:
        tree = yaml.safe_load((ROOT / "params.yaml").read_text())
        clip = {k: getattr(TINY_CLIP, k) for k in ("frames", "height", "width", "max_sequence_length")}
        parts = {"train_clips": 5, "calibration_clips": 2, "held_out_clips": 2, "batch_size": 2, "shard_size": 2}
        tree["prepare"] |= {"source": "videos", "folder": str(root / "videos"), "fps": 8, "max_skipped": 0.25, **clip, **parts}
        workers = changes.pop("workers", 0)
        tree["prepare"] |= changes
        tree["compute"]["workers"] = workers
        self.params, self.root, self.device = validate_params(tree, "params.yaml"), root, torch.device("cpu")
        self.share = share
        self.made: dict[str, Path] = {}

    @property
    def checkpoint_dir(self) -> Path:
        (self.root / "ckpt").mkdir(exist_ok=True)
        return self.root / "ckpt"

    @contextmanager
    def outputs(self, path: str) -> Any:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.suffix:
            place.mkdir()
        yield place

    def progress(self, total: int, initial: int = 0, unit: str = "") -> Progress:
        return Progress(total=total, initial=initial, unit=unit)

    def log_metrics(self, values: Any) -> None:
        assert all(isinstance(value, int | float) for value in values.values())


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    tiny_pipeline("wan", folder / "artifacts/model")
    videos, generator = folder / "videos", torch.Generator().manual_seed(0)
    videos.mkdir()
    for i in range(GOOD):
        noise = torch.rand(3, TINY_CLIP.frames + 8, 4, 4, generator=generator)
        write_video(videos / f"{i}.mp4", noise.repeat_interleave(8, -1).repeat_interleave(8, -2) * 2 - 1)
    write_video(videos / "short.mp4", torch.zeros(3, 3, 32, 32))
    whole = (videos / "0.mp4").read_bytes()
    (videos / "corrupt.mp4").write_bytes(bytes(200) + whole[200:])
    with (videos / "captions.csv").open("w", newline="") as file:
        names = [*(f"{i}.mp4" for i in range(GOOD)), *BAD]
        csv.writer(file).writerows([("file", "caption"), *((name, f"clip {i % 3}") for i, name in enumerate(names))])
    return folder


def project(sources: Path, root: Path) -> Path:
    root.mkdir()
    (root / "artifacts").mkdir()
    for name in ("artifacts/model", "videos"):
        (root / name).symlink_to(sources / name)
    return root


def content(root: Path) -> dict[str, bytes]:
    folder = root / "artifacts/data"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(stage: FakeStage) -> None:
    prepare.run(stage)  # type: ignore[arg-type]


def test_what_cannot_be_read_is_listed_and_a_stopped_run_goes_on(sources: Path, tmp_path: Path, monkeypatch: Any) -> None:
    whole = project(sources, tmp_path / "whole")
    run(FakeStage(whole))
    found = json.loads((whole / "metrics/prepare.json").read_text())
    assert found["skipped"] == 2 and sum(found["clips"].values()) == GOOD and found["captions"] == 3
    assert {name.split(": ")[1] for name in found["reasons"]} == set(BAD)
    assert any("cannot be read as a video" in reason for reason in found["reasons"].values())
    assert any("3 frames" in reason for reason in found["reasons"].values())
    parts = {part: LatentDataset.open(whole / "artifacts/data" / part) for part in found["clips"]}
    assert {part: len(data) for part, data in parts.items()} == found["clips"]
    assert all(torch.isfinite(data.latents[:]).all() for data in parts.values())
    assert not [name for name in content(whole) if name.endswith("json") and "shard" in name]

    # Stopped at each batch in turn, and with threads that read ahead: the same files, and nothing encoded twice but a shard.
    encode, calls, limit = WanFamily.encode_clips, [], [0]

    def counted(self: Any, pipeline: Any, clips: torch.Tensor) -> torch.Tensor:
        if len(calls) == limit[0]:
            raise KeyboardInterrupt
        calls.append(len(clips))
        return encode(self, pipeline, clips)

    monkeypatch.setattr(WanFamily, "encode_clips", counted)
    stopped = project(sources, tmp_path / "stopped")
    for attempt in range(20):
        limit[0] = len(calls) + 1
        try:
            run(FakeStage(stopped, workers=2))
            break
        except KeyboardInterrupt:
            assert not (stopped / "artifacts/data").exists(), attempt
    assert content(stopped) == content(whole) and sum(calls) == GOOD

    # Stopped in the end, while the files are flushed, by a process that had left a draft before it was killed.
    shutil.rmtree(stopped / "artifacts/data")
    (stopped / "ckpt/data/train/.shard-00000.safetensors.1").touch()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FakeStage, "outputs", lambda stage, path: stopped_outputs(stage.root / path))
        run(FakeStage(stopped))
    assert not (stopped / "artifacts/data").exists()
    run(FakeStage(stopped))
    assert content(stopped) == content(whole) and sum(calls) == GOOD
    assert (stopped / "metrics/prepare.json").read_text() == (whole / "metrics/prepare.json").read_text()


@contextmanager
def stopped_outputs(place: Path) -> Any:
    with write_whole(place) as new:
        yield new
        raise KeyboardInterrupt


KILLED = """
import os, signal, sys
from pathlib import Path
from qvgen.models.wan import WanFamily
from qvgen.share import Share
from tests.unit.stages.test_prepare import FakeStage, run

encode = WanFamily.encode_clips
calls = []

def killed(self, pipeline, clips):
    calls.append(clips)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, pipeline, clips)

WanFamily.encode_clips = killed
run(FakeStage(Path(sys.argv[1]), Share(1, 2), batch_size=1))
"""


def test_processes_share_the_shards_and_one_is_killed(sources: Path, tmp_path: Path) -> None:
    """Of two one is killed (SIGKILL) at its second clip and started again."""
    whole, shared = (project(sources, tmp_path / name) for name in ("whole", "shared"))
    run(FakeStage(whole, batch_size=1))
    command = [sys.executable, "-c", KILLED, str(shared)]
    killed = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    shards = shared / "ckpt/data/train"
    assert not list(shards.glob("*.json"))
    run(FakeStage(shared, Share(1, 2), batch_size=1))
    assert [path.stem for path in shards.glob("*.json")] == ["shard-00001"]  # of three, for five clips
    assert not (shared / "artifacts/data").exists() and not (shared / "metrics/prepare.json").exists()
    run(FakeStage(shared, Share(0, 2), batch_size=1))
    assert content(shared) == content(whole)
    assert (shared / "metrics/prepare.json").read_text() == (whole / "metrics/prepare.json").read_text()


def test_clips_of_several_sizes_and_a_stop_between_them(sources: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Each video goes to the bucket of nearest aspect ratio; a shard holds all of them; a run that goes on leaves the same."""
    folder, generator = tmp_path / "shapes", torch.Generator().manual_seed(0)
    folder.mkdir()
    shapes = [(32, 32), (32, 56), (64, 40), (40, 40), (32, 64), (48, 32), (36, 32), (64, 32), (32, 48)]
    for i, (height, width) in enumerate(shapes):
        noise = torch.rand(3, TINY_CLIP.frames, height // 4, width // 4, generator=generator) * 2 - 1
        write_video(folder / f"{i}.mp4", noise.repeat_interleave(4, -1).repeat_interleave(4, -2))
        (folder / f"{i}.txt").write_text(f"clip {i}")
    changes: dict[str, Any] = {
        "folder": str(folder),
        "buckets": [[32, 32], [32, 48], [48, 32]],
        "batch_size": 2,
        "shard_size": 2,
    }
    whole = project(sources, tmp_path / "whole")
    run(FakeStage(whole, **changes))
    found = json.loads((whole / "metrics/prepare.json").read_text())
    totals = {name: sum(part[name] for part in found["buckets"].values()) for name in ("32x32", "32x48", "48x32")}
    assert totals == {"32x32": 3, "32x48": 3, "48x32": 3} and {
        part: sum(n.values()) for part, n in found["buckets"].items()
    } == {
        "train": 5,
        "calibration": 2,
        "held_out": 2,
    }
    data = LatentDataset.open(whole / "artifacts/data/train")
    expected = {0: (4, 4), 1: (4, 6), 2: (6, 4), 3: (4, 4), 4: (4, 6), 5: (6, 4), 6: (4, 4), 7: (6, 4), 8: (4, 6)}
    for i in range(len(data)):
        assert data.latents[i : i + 1].shape[-2:] == expected[int(data.caption(i)[-1])]

    encode, calls, limit = WanFamily.encode_clips, [], [0]

    def counted(self: Any, pipeline: Any, clips: torch.Tensor) -> torch.Tensor:
        if len(calls) == limit[0]:
            raise KeyboardInterrupt
        calls.append(len(clips))
        return encode(self, pipeline, clips)

    monkeypatch.setattr(WanFamily, "encode_clips", counted)
    stopped = project(sources, tmp_path / "stopped")
    for _ in range(9):
        limit[0] = len(calls) + 2  # a shard of two sizes takes two calls
        try:
            run(FakeStage(stopped, **changes))
            break
        except KeyboardInterrupt:
            assert not (stopped / "artifacts/data").exists()
    assert content(stopped) == content(whole)

    (missing, *_) = [name for name, clips in found["buckets"]["held_out"].items() if not clips]
    height, width = map(int, missing.split("x"))
    settings = FakeStage(whole, **changes, height=height, width=width).params.prepare
    with pytest.raises(ValueError, match=rf"no held-out clip is {height} x {width}, which evaluation measures \(.*\): raise"):
        prepare.clips_of_buckets(whole / "artifacts/data/held_out", settings)


def test_too_many_is_an_error(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"2 of 9 clips cannot be read, prepare\.max_skipped = 0\.2 allows 1: replace it"):
        run(FakeStage(project(sources, tmp_path / "a"), max_skipped=0.2))
    with pytest.raises(ValueError, match=r"(short|corrupt)\.mp4 .*1 of 9 clips cannot be read"):
        run(FakeStage(project(sources, tmp_path / "b"), max_skipped=0.0))

    # Each of two processes finds one, the other one while the main process waits for it.
    shared = project(sources, tmp_path / "c")
    options: dict[str, Any] = {"max_skipped": 0.2, "held_out_clips": 1, "train_clips": 6, "batch_size": 1, "shard_size": 1}
    monkeypatch.setattr(ShardWriter, "wait", lambda writer: run(FakeStage(shared, Share(1, 2), **options)))
    with pytest.raises(ValueError, match=r"2 of 9 clips cannot be read, prepare\.max_skipped = 0\.2 allows 1"):
        run(FakeStage(shared, Share(0, 2), **options))
    found = [json.loads(path.read_text()) for path in (shared / "ckpt/data").glob("*/*.json") if path.stem != "captions"]
    assert sorted(name for record in found for name in record) == sorted(BAD)


def test_sixteen_bits_and_several_clips_of_a_video(sources: Path, tmp_path: Path) -> None:
    """Three clips of each of 9 videos, the last one of a part cut short: parts share no video."""
    root = project(sources, tmp_path / "a")
    sizes = {"train_clips": 13, "calibration_clips": 4, "held_out_clips": 4}
    run(FakeStage(root, dtype="bfloat16", clips_per_video=3, start="random", max_skipped=0.5, **sizes))
    found = json.loads((root / "metrics/prepare.json").read_text())
    assert all(" clip " in name for name in found["reasons"])
    data = LatentDataset.open(root / "artifacts/data/train")
    assert len(data) == found["clips"]["train"] and data.latents[:].dtype == torch.float32
    assert torch.equal(data.latents[:], data.latents[:].bfloat16().float())
    assert len(torch.unique(data.latents[:].flatten(1), dim=0)) == len(data)  # other places of the same videos


def test_shards_in_s3_are_those_at_hand(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded once; then an address without a bucket, no keys, and training's batches out of the bucket."""
    local, remote = (project(sources, tmp_path / name) for name in ("local", "remote"))
    run(FakeStage(local))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("QVGEN_CACHE", str(tmp_path / "cache"))
    with s3(tmp_path / "s3", "shards") as variables:
        monkeypatch.setenv("AWS_ENDPOINT_URL", variables["AWS_ENDPOINT_URL"])
        with pytest.raises(ValueError, match=r"s3://shards/a cannot be reached .*no access, set .* AWS_PROFILE or AWS_ACCESS"):
            run(FakeStage(remote, store="s3://shards/a"))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        with pytest.raises(ValueError, match=r"s3://nowhere/a does not exist: check the address \(prepare\.store\)"):
            run(FakeStage(remote, store="s3://nowhere/a"))
        run(FakeStage(remote, store="s3://shards/a"))
        expected, found = (LatentDataset.open(folder / "artifacts/data/train") for folder in (local, remote))
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        index = torch.tensor([3, 0, 2])
        for one, other in zip(expected.batch(index, 0.5, generators[0]), found.batch(index, 0.5, generators[1]), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(found.latents[:], expected.latents[:])
    assert not [name for name in content(remote) if "/shard-" in name] and "train/shards.json" in content(remote)
    with pytest.raises(ValueError, match=r"prepare\.store"):
        FakeStage(remote, store="s3://key:secret@shards/a")
