"""Latents and text embeddings, computed once and read by training, calibration and evaluation.

captions.json            list of the distinct captions
text.safetensors         embeddings (captions + 1, l, d) float32; the last row is the empty caption
train/ calibration/ held_out/ shard-00000.safetensors
                         latents (n, ...) float32, caption_index (n,) int64
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qvgen.models.family import Family
from qvgen.tensors import save_tensors

PARTS = ("train", "calibration", "held_out")


class LatentDataset:
    """One part of the precomputed data, in memory."""

    def __init__(
        self, latents: torch.Tensor, caption_index: torch.Tensor, captions: list[str], embeddings: torch.Tensor
    ) -> None:
        self.latents, self.caption_index = latents, caption_index
        self.captions, self.embeddings = captions, embeddings

    @classmethod
    def open(cls, part: str | Path) -> LatentDataset:
        """Read a folder such as artifacts/data/train. Raises ValueError if it holds no shards or NaN."""
        part = Path(part)
        shards = sorted(part.glob("shard-*.safetensors"))
        if not shards:
            raise ValueError(f"{part} holds no shard-*.safetensors; run the prepare stage")
        tensors = [load_file(shard) for shard in shards]
        latents = torch.cat([t["latents"] for t in tensors])
        if not torch.isfinite(latents).all():
            raise ValueError(f"{part} holds NaN or Inf; run the prepare stage again and check the source clips")
        captions = json.loads((part.parent / "captions.json").read_text())
        embeddings = load_file(part.parent / "text.safetensors")["embeddings"]
        return cls(latents, torch.cat([t["caption_index"] for t in tensors]), captions, embeddings)

    def __len__(self) -> int:
        return len(self.latents)

    def text(self, index: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, l, d) of samples."""
        return self.embeddings[self.caption_index[index]]

    def caption(self, index: int) -> str:
        return self.captions[int(self.caption_index[index])]

    def batch(
        self, index: torch.Tensor, caption_dropout: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and embeddings of samples; a share `caption_dropout` of the captions is replaced by the empty one."""
        dropped = torch.rand(len(index), generator=generator) < caption_dropout
        caption = torch.where(dropped, len(self.captions), self.caption_index[index])
        return self.latents[index], self.embeddings[caption]


@torch.no_grad()
def write_text(
    folder: Path, pipeline: Any, family: Family, captions: Sequence[str], max_sequence_length: int, batch_size: int
) -> None:
    """captions.json and text.safetensors. Raises ValueError for an empty list or an empty caption."""
    if not captions:
        raise ValueError("there are no captions; at least one clip with a caption is needed")
    if any(not caption.strip() for caption in captions):
        raise ValueError("a caption is empty; the empty caption is added by itself, for guidance")
    texts = [*captions, ""]
    parts = [
        family.encode_text(pipeline, texts[i : i + batch_size], max_sequence_length).float().cpu()
        for i in range(0, len(texts), batch_size)
    ]
    (folder / "captions.json").write_text(json.dumps(list(captions), indent=0, ensure_ascii=False))
    save_tensors(folder / "text.safetensors", {"embeddings": torch.cat(parts)})


@torch.no_grad()
def write_part(
    folder: Path,
    pipeline: Any,
    family: Family,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    shard_size: int,
    on_batch: Callable[[int], object] | None = None,
) -> None:
    """Encode batches of (clips (n, 3, t, h, w) in [-1, 1], caption_index (n,)) into shards of at most `shard_size`."""
    folder.mkdir(parents=True, exist_ok=True)
    latents: list[torch.Tensor] = []
    index: list[torch.Tensor] = []
    shard = 0

    def flush(everything: bool) -> None:
        nonlocal shard, latents, index
        if not latents:
            return
        all_latents, all_index = torch.cat(latents), torch.cat(index)
        while len(all_latents) >= shard_size or (everything and len(all_latents)):
            now = {"latents": all_latents[:shard_size], "caption_index": all_index[:shard_size]}
            save_tensors(folder / f"shard-{shard:05d}.safetensors", now)
            all_latents, all_index, shard = all_latents[shard_size:], all_index[shard_size:], shard + 1
        latents, index = [all_latents], [all_index]

    for clips, caption_index in batches:
        encoded = family.encode_clips(pipeline, clips).float().cpu()
        if not torch.isfinite(encoded).all():
            raise ValueError(f"{folder.name}: a clip gives NaN or Inf latents; check that its pixels are finite")
        latents.append(encoded)
        index.append(caption_index)
        flush(everything=False)
        if on_batch is not None:
            on_batch(len(clips))
    flush(everything=True)
    if shard == 0:
        raise ValueError(f"{folder.name}: there are no clips")
