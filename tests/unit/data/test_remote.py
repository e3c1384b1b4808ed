"""Shards in a store of fsspec are read as those at hand: here a folder, `file://`; S3 in tests/unit/stages/test_prepare.py."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from qvgen.cache import Blocks
from qvgen.data import remote
from qvgen.data.latents import LatentDataset, part_writer, save_text
from qvgen.data.remote import Store, replace_shards, upload_shards

CLIPS, TEXT = 11, 4
BLOCK = 100  # bytes: a clip of 2 x 3 x 4 has 96 in float32


def write(folder: Path, dtype: torch.dtype) -> None:
    """Clips of two sizes in three shards, their text in two."""
    generator = torch.Generator().manual_seed(0)
    clips = {i: torch.randn(2, 3, 4 + (i % 3 == 1), generator=generator).to(dtype) for i in range(CLIPS)}
    rows = {i: {"latents": clip, "caption_index": torch.tensor(i % 3)} for i, clip in clips.items()}
    part_writer(folder / "train", CLIPS, 4).add(range(CLIPS), rows)
    text = torch.randn(TEXT, 6, 8, generator=generator).to(dtype)
    text[1, 2:] = 0
    save_text(folder / "text/shard-00000.safetensors", text[:2].unbind())
    save_text(folder / "text/shard-00001.safetensors", text[2:].unbind())
    (folder / "captions.json").write_text('["a", "b", "c"]')


def move(folder: Path, store: str) -> None:
    Store(store).check()
    for name in ("train", "text"):
        replace_shards(folder / name, upload_shards(folder / name, store))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QVGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "BLOCK", BLOCK)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("dtype", "damage"),
    [(torch.float32, lambda block: block[:-1]), (torch.bfloat16, lambda block: bytes(len(block)))],
    ids=["float32 cut off", "bfloat16 zeros"],
)
def test_what_was_uploaded_is_read_as_before(dtype: torch.dtype, damage: Any, tmp_path: Path, cache: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        write(folder, dtype)
    move(there, f"file://{tmp_path}/store")
    assert not list(there.rglob("*.safetensors")) and len(list((tmp_path / "store").glob("*.safetensors"))) == 3 + 2
    local = LatentDataset.open(here / "train")
    for data in (LatentDataset.open(there / "train"), pickle.loads(pickle.dumps(LatentDataset.open(there / "train")))):
        assert len(data) == CLIPS and torch.equal(data.caption_index, local.caption_index)
        assert data.latents.sizes == local.latents.sizes and torch.equal(data.size_index, local.size_index)
        for i in reversed(range(CLIPS)):
            assert torch.equal(data.latents[torch.tensor([i])], local.latents[torch.tensor([i])]), i
        assert torch.equal(data.embeddings[torch.arange(TEXT)], local.embeddings[torch.arange(TEXT)])
    for path in (tmp_path / "store").glob("*.safetensors"):
        path.unlink()
    again = LatentDataset.open(there / "train")  # out of the cache
    assert torch.equal(again.latents[torch.tensor([9, 0, 3])], local.latents[torch.tensor([9, 0, 3])])
    for path in cache.rglob("*"):  # the power failed
        if path.is_file():
            path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"store/[0-9a-f]{64}\.safetensors does not exist: check the address \(prepare\.st"):
        LatentDataset.open(there / "train")


def test_bytes_that_prepare_did_not_write_are_refused(tmp_path: Path, cache: Path) -> None:
    write(tmp_path, torch.float32)
    move(tmp_path, f"file://{tmp_path}/store")
    for path in (tmp_path / "store").glob("*.safetensors"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    data = LatentDataset.open(tmp_path / "train")  # what it reads is whole
    with pytest.raises(ValueError, match=r"block \d+ is not what stage prepare wrote.*delete the file and run the prepare"):
        for i in range(CLIPS):
            data.latents[torch.tensor([i])]


def test_an_upload_that_was_cut_off_goes_on(tmp_path: Path, cache: Path) -> None:
    write(tmp_path, torch.float32)
    Store(f"file://{tmp_path}/store").check()
    index = upload_shards(tmp_path / "train", f"file://{tmp_path}/store")
    first, second, _ = sorted((tmp_path / "store").glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:10])
    before = second.stat().st_mtime_ns
    assert upload_shards(tmp_path / "train", f"file://{tmp_path}/store/") == index
    assert second.stat().st_mtime_ns == before and first.stat().st_size > 10


def test_the_cache_keeps_within_its_bound_what_was_read_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, content = Blocks(tmp_path, 1000), [bytes([i]) * 100 for i in range(30)]
    names = [remote.hashlib.sha256(block).hexdigest() for block in content]
    sizes = []
    for block in content:
        blocks.put(block)
        assert blocks.get(names[0]) == content[0]
        sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))
    assert 800 <= max(sizes) <= 1000 and blocks.get(names[-1]) and not blocks.get(names[1])
    for given, message in (("-1", "QVGEN_BLOCKS_GB=-1 is no number of gigabytes"), ("ten", "QVGEN_BLOCKS_GB=ten")):
        monkeypatch.setenv("QVGEN_BLOCKS_GB", given)
        with pytest.raises(ValueError, match=message):
            Blocks(tmp_path)
    monkeypatch.setenv("QVGEN_BLOCKS_GB", "0.002")
    assert Blocks(tmp_path).limit == 2_000_000


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("abfs://data/shards", r"abfs://data/shards needs a driver of fsspec that is not here .*pip install adlfs"),
        ("s4://data", r"s4://data cannot be reached .*Protocol not known: s4.*check address and network"),
        ("file:///proc/nowhere", r"file:///proc/nowhere (cannot be reached|does not exist)"),
    ],
)
def test_an_address_that_cannot_be_used_is_named(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Store(address).check()
