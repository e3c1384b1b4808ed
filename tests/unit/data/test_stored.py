"""Latents and text that stay in their files: the tensors that were written, whatever the shards, in memory of one size."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qvgen.data.latents import LatentDataset, part_writer, save_text, text_writer
from qvgen.data.shards import ShardWriter, remove_records
from qvgen.data.stored import OPEN, StoredLatents, StoredText
from qvgen.tensors import save_tensors

CLIPS, SHARD = 11, 4


def latents_in(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    latents = torch.randn(CLIPS, 2, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    for number, part in enumerate(latents.split(SHARD)):
        folder.mkdir(parents=True, exist_ok=True)
        index = torch.arange(number * SHARD, number * SHARD + len(part)) % 3
        save_tensors(folder / f"shard-{number:05d}.safetensors", {"latents": part, "caption_index": index})
    return latents


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_are_those_that_were_written(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = latents_in(tmp_path / "train", dtype).float()
    stored = pickle.loads(pickle.dumps(StoredLatents(tmp_path / "train")))  # as a worker gets it
    index = torch.tensor([10, 0, 4, 4, 7, 3])
    assert len(stored) == CLIPS and stored.shape == expected.shape
    assert torch.equal(stored[index], expected[index])
    assert torch.equal(stored[2:9], expected[2:9]) and stored[:].dtype == torch.float32
    assert stored.caption_index.tolist() == [i % 3 for i in range(CLIPS)]


def test_text_is_stored_without_its_padding_and_comes_back_with_it(tmp_path: Path) -> None:
    text = torch.randn(5, 8, 4, generator=torch.Generator().manual_seed(1))
    text[0, 3:] = 0  # as Wan's pipeline pads
    text[1] = 0
    text[2, 2] = 0  # within
    text[3, 7, 0] = 0
    save_text(tmp_path / "text/shard-00000.safetensors", text[:3].unbind())
    save_text(tmp_path / "text/shard-00001.safetensors", text[3:].unbind())
    stored = StoredText(tmp_path / "text")
    assert stored.shape == (5, 8, 4) and torch.equal(stored[:], text)
    assert torch.equal(stored[torch.tensor([4, 0, 0])], text[[4, 0, 0]])
    rows = 3 + 0 + 8 + 8 + 8
    assert sum(path.stat().st_size for path in (tmp_path / "text").iterdir()) < rows * 16 + 1000


def test_a_part_reads_its_text_beside_it(tmp_path: Path) -> None:
    latents = latents_in(tmp_path / "train")
    text = torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(1))
    save_text(tmp_path / "text/shard-00000.safetensors", text.unbind())
    (tmp_path / "captions.json").write_text('["a", "b", "c"]')
    stored = LatentDataset.open(tmp_path / "train")
    memory = LatentDataset(latents, stored.caption_index, ["a", "b", "c"], text)
    index = torch.tensor([5, 9, 1, 2])
    for rate in (0.0, 0.5):
        generators = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
        for a, b in zip(stored.batch(index, rate, generators[0]), memory.batch(index, rate, generators[1]), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(stored.text(index), text[index % 3]) and stored.caption(5) == "c"


def test_clips_of_several_sizes(tmp_path: Path) -> None:
    """Shards of clips of one size are those of before, bit for bit; the others say which clip has which."""
    shapes = {i: (2, 3, 4 + i % 3) if i < 8 else (2, 3, 5) for i in range(11)}
    rows = {i: (torch.full(shape, float(i)), torch.tensor(i % 3)) for i, shape in shapes.items()}
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype) / "train"
        named = {i: {"latents": x.to(dtype), "caption_index": c} for i, (x, c) in rows.items()}
        part_writer(folder, 11, 4).add(range(11), named)
        old = {"latents": torch.stack([rows[i][0].to(dtype) for i in (8, 9, 10)]), "caption_index": torch.tensor([2, 0, 1])}
        save_tensors(tmp_path / "old", old)
        assert (folder / "shard-00002.safetensors").read_bytes() == (tmp_path / "old").read_bytes()
        stored = pickle.loads(pickle.dumps(StoredLatents(folder)))
        assert len(stored) == 11 and stored.caption_index.tolist() == [i % 3 for i in range(11)]
        assert [stored.sizes[i] for i in stored.size_index] == list(shapes.values())
        for i, shape in shapes.items():
            assert torch.equal(stored[torch.tensor([i])], torch.full((1, *shape), float(i))), i
        assert torch.equal(stored[torch.tensor([10, 1, 9, 4])][:, 0, 0, 0], torch.tensor([10.0, 1, 9, 4]))
        for mixed in (slice(0, 2), torch.tensor([9, 0])):
            with pytest.raises(ValueError, match=r"train: clips of several sizes are no batch, .* \(2, 3, 4\), \(2, 3, 5\)"):
                stored[mixed]
        with pytest.raises(ValueError, match="clips of several sizes"):
            _ = stored.shape
        data = LatentDataset(stored, stored.caption_index, ["a", "b", "c"], torch.arange(4.0).view(4, 1, 1))
        wide = data.of_size(30, 60)
        assert wide.latents[:][:, 0, 0, 0].tolist() == [2.0, 5.0] and wide.latents.shape == (2, 2, 3, 6)
        assert wide.text_of_samples[:].flatten().tolist() == [2.0, 2.0] and wide.caption(1) == "c"
        assert wide.size_index.tolist() == [0, 0]
        with pytest.raises(ValueError, match="none of 11 clips is 30 x 30: take more clips"):
            data.of_size(30, 30)
    one = LatentDataset(torch.zeros(3, 2), torch.zeros(3).long(), ["a"], torch.zeros(2, 1, 1))
    assert one.of_size(7, 9) is one


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train holds no shard-\*\.safetensors; run the prepare stage"):
        StoredLatents(tmp_path / "train")
    bad = torch.zeros(3, 2)
    bad[1, 0] = torch.nan
    (tmp_path / "train").mkdir()
    save_tensors(tmp_path / "train/shard-00000.safetensors", {"latents": bad, "caption_index": torch.zeros(3).long()})
    stored = StoredLatents(tmp_path / "train")
    assert stored[torch.tensor([0, 2])].sum() == 0
    with pytest.raises(ValueError, match="train holds NaN or Inf; run the prepare stage again"):
        stored[torch.tensor([1])]


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def fill(writer: ShardWriter, batch_size: int, stop_after: int | None = None) -> int:
    """Write row i as (i, 10 i); 5 and 8..11 cannot be read. Returns the number of batches that were made."""
    made = 0
    for span in writer.spans(batch_size):
        if not writer.done(span):
            if made == stop_after:
                return made
            bad = {i: (f"{i}.mp4", f"no frame {i}") for i in span if i == 5 or 8 <= i < 12}
            good = [i for i in span if i not in bad]
            rows = {i: {"latents": torch.tensor([i, 10.0 * i]), "caption_index": torch.tensor(i)} for i in good}
            writer.add(span, rows, bad)
            made += 1
    return made


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 20])
def test_a_run_that_is_cut_off_leaves_the_shards_of_one_that_is_not(tmp_path: Path, batch_size: int) -> None:
    """Shards of 4 rows, one of which has none that could be read; cut off after every possible number of batches."""
    whole = part_writer(tmp_path / "whole", 18, 4)
    batches = fill(whole, batch_size)
    expected = written(tmp_path / "whole")
    assert [name for name in expected if name.endswith(".safetensors")] == [f"shard-0000{i}.safetensors" for i in (0, 1, 3, 4)]
    assert list(whole.skipped()) == ["5.mp4", "8.mp4", "9.mp4", "10.mp4", "11.mp4"]
    stored = StoredLatents(tmp_path / "whole")
    assert stored[:][:, 0].tolist() == [i for i in range(18) if i != 5 and not 8 <= i < 12] == stored.caption_index.tolist()
    for stop in range(batches):
        folder = tmp_path / f"{stop}"
        fill(part_writer(folder, 18, 4), batch_size, stop)
        again = part_writer(folder, 18, 4)
        left = fill(again, batch_size)
        assert written(folder) == expected and again.skipped() == whole.skipped()
        assert left <= batches - stop + -(-4 // batch_size)  # at most one shard is made again


MEASURE = """
import sys
from pathlib import Path
import torch
from qvgen.data.latents import LatentDataset
from qvgen.device import peak_resident_mb

def read(part):
    data, generator = LatentDataset.open(part), torch.Generator().manual_seed(0)
    for _ in range(40):
        data.batch(torch.randint(len(data), (4,), generator=generator), 0.1, generator)
    return peak_resident_mb()

few = read(Path(sys.argv[1]))
print(len(LatentDataset.open(Path(sys.argv[2]))), read(Path(sys.argv[2])) - few)
"""


def test_memory_does_not_grow_with_the_number_of_clips(tmp_path: Path) -> None:
    """As many shards as are mapped at a time, whose pages count as resident, then 100 times as many: the same file in many
    places, which the reader cannot know."""
    (few, many) = (tmp_path / "few/train", tmp_path / "many/train")
    shard = {"latents": torch.randn(24, 16, 4, 64, 64), "caption_index": torch.zeros(24).long()}
    save_tensors(tmp_path / "shard.safetensors", shard)
    for part, count in ((few, OPEN), (many, 100 * OPEN)):
        part.mkdir(parents=True)
        for number in range(count):
            (part / f"shard-{number:05d}.safetensors").hardlink_to(tmp_path / "shard.safetensors")
        save_text(part.parent / "text/shard-00000.safetensors", torch.randn(2, 8, 4).unbind())
        (part.parent / "captions.json").write_text('["a"]')
    command = [sys.executable, "-c", MEASURE, str(few), str(many)]
    heap = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc raises it, and then keeps some 60 MB of batches, now more, now less
    clips, grown = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | heap).stdout.split()
    size = (tmp_path / "shard.safetensors").stat().st_size / 1e6
    assert int(clips) == 100 * OPEN * 24 and size > 25
    assert float(grown) < 2 * size, f"{grown} MB more for {100 * OPEN * size:.0f} MB of clips"


@pytest.mark.parametrize("shard_size", [4, 3, 2])
def test_few_captions_are_one_file_and_read_alike(tmp_path: Path, shard_size: int) -> None:
    latents_in(tmp_path / "train")
    text = torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(1))
    text[1, 5:] = 0
    writer = text_writer(tmp_path, ["a", "b", "c"], shard_size)
    for span in writer.spans(3):
        writer.add(span, {i: text[i] for i in span})
    remove_records(tmp_path)
    assert (tmp_path / "text.safetensors").exists() == (shard_size == 4) != (tmp_path / "text").exists()
    data = LatentDataset.open(tmp_path / "train")
    assert torch.equal(data.embeddings[torch.arange(4)], text) and data.captions == ["a", "b", "c"]
