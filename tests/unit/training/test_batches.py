"""The order of training: a function of seed, step and rank, the same from files and in any number of processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qvgen.data.latents import LatentDataset, part_writer, save_text
from qvgen.models.wan import WanFamily
from qvgen.params import Params, validate_params
from qvgen.training.batches import Batches

ROOT = Path(__file__).parents[3]


def params(**changes: Any) -> Params:
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    tree["qat"] |= {"batch_size": 6, "caption_dropout": 0.4} | changes
    return validate_params(tree, "params.yaml")


def data() -> LatentDataset:
    latents, text = torch.arange(50.0)[:, None].expand(50, 16).contiguous(), torch.arange(4.0)[:, None, None].expand(4, 2, 3)
    return LatentDataset(latents, torch.arange(50) % 3, ["a", "b", "c"], text.contiguous())


def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_processes_share_the_batch_of_one() -> None:
    whole = Batches(data(), WanFamily(), params())
    for world in (2, 3, 6):
        ranks = [Batches(data(), WanFamily(), params(), rank, world) for rank in range(world)]
        for step in (0, 1, 17):
            parts = [batch[step] for batch in ranks]
            assert {len(part[0]) for part in parts} == {6 // world}
            assert equal(tuple(torch.cat(column) for column in zip(*parts, strict=True)), whole[step])
    assert not equal(whole[3], whole[4]) and equal(whole[3], Batches(data(), WanFamily(), params())[3])
    with pytest.raises(
        ValueError, match="batch_size = 6 clips cannot be shared equally by 4 processes: choose a multiple of 4"
    ):
        Batches(data(), WanFamily(), params(), 0, 4)
    in_threes = params().model_copy(update={"compute": params().compute.model_copy(update={"micro_batch": 3})})
    with pytest.raises(ValueError, match=r"micro_batch = 3 does not divide a process's 2 clips"):
        Batches(data(), WanFamily(), in_threes, 0, 3)


def test_captions_are_dropped_and_belong_to_their_clips() -> None:
    batches = Batches(data(), WanFamily(), params())
    dropped = 0
    for step in range(20):
        clean, text, *_ = batches[step]
        for clip, caption in zip(clean[:, 0].tolist(), text[:, 0, 0].tolist(), strict=True):
            assert caption in (clip % 3, 3)
            dropped += caption == 3
    assert 0.25 < dropped / 120 < 0.55


def test_a_batch_has_clips_of_one_size(tmp_path: Path) -> None:
    """Clip i has one of three sizes, which many, some and few have; each clip is drawn about equally often, whatever its size,
    and a batch is a function of seed, step and rank."""
    sides = {0: 4, 1: 4, 2: 4, 3: 6, 4: 8}
    clips = [torch.full((1, 2, sides[i % 5]), float(i)) for i in range(50)]
    rows = {i: {"latents": clip, "caption_index": torch.tensor(0)} for i, clip in enumerate(clips)}
    writer = part_writer(tmp_path / "train", 50, 8)
    writer.add(range(50), rows)
    save_text(tmp_path / "text/shard-00000.safetensors", torch.randn(2, 2, 3).unbind())
    (tmp_path / "captions.json").write_text('["a"]')
    stored = LatentDataset.open(tmp_path / "train")
    whole, other = (Batches(stored, WanFamily(), params()) for _ in range(2))
    ranks = [Batches(stored, WanFamily(), params(), rank, 3) for rank in range(3)]
    drawn = torch.zeros(50)
    steps = 500
    for step in range(steps):
        clean, _, _, noise, _ = batch = whole[step]
        found = clean[:, 0, 0, 0].int().tolist()
        assert {sides[clip % 5] for clip in found} == {clean.shape[-1]} and noise.shape == clean.shape
        drawn += torch.bincount(torch.tensor(found), minlength=50)
        if step < 20:
            assert equal(batch, other[step])
            assert equal(batch, tuple(torch.cat(column) for column in zip(*(rank[step] for rank in ranks), strict=True)))
    by_side = {side: drawn[[i for i in range(50) if sides[i % 5] == side]].sum() / (6 * steps) for side in (4, 6, 8)}
    for side, share in ((4, 0.6), (6, 0.2), (8, 0.2)):
        assert abs(by_side[side] - share) < 0.07, by_side  # 4 deviations of 500 draws
    assert drawn.min() > 0


@pytest.mark.slow
def test_other_processes_read_the_same_batches() -> None:
    batches = Batches(data(), WanFamily(), params())
    state = torch.get_rng_state()
    ahead = list(batches.between(5, 12, workers=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(ahead) == 7 and all(equal(found, batches[step]) for step, found in enumerate(ahead, start=5))
