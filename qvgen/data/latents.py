"""Latents and text embeddings, computed once and read by training, calibration and evaluation.

captions.json            list of the distinct captions
text.safetensors         embeddings (captions + 1, l, d), the empty caption last, where they fill no more than one shard; else
text/shard-00000.safetensors
                         rows (r, d) of many of them together, without padding, and offsets (n + 1,) int64, where each begins;
                         max_sequence_length in the metadata
train/ calibration/ held_out/ shard-00000.safetensors
                         latents (n, ...), caption_index (n,) int64; of families that read a first frame also that frame,
                         first_frame (n, 3, h, w) uint8, and what an image encoder makes of it, image (n, m, e); where clips
                         have several sizes latents.0, latents.1, ... instead (and first_frame.0, ...), and size_index (n,),
                         which of them holds each
shards.json              in the place of the shards of a folder if they lie in an object store (data/remote.py)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qvgen.data.shards import ShardWriter
from qvgen.data.stored import LATENTS, LENGTH, SIZES, Latents, Selected, StoredLatents, StoredText, without_padding
from qvgen.models.family import Family
from qvgen.models.pictures import first_frames
from qvgen.share import ALONE, Share
from qvgen.tensors import save_tensors

PARTS = ("train", "calibration", "held_out")
TEXT, WHOLE_TEXT, CAPTIONS = "text", "text.safetensors", "captions.json"
IMAGE, FIRST_FRAME = "image", "first_frame"  # tensors of a shard, beside the latents


class LatentDataset:
    """One part of the precomputed data: in files, of which samples are read as they are asked for, or given as tensors."""

    def __init__(
        self,
        latents: Latents,
        caption_index: torch.Tensor,
        captions: list[str],
        embeddings: torch.Tensor | StoredText,
        image: Latents | None = None,
        first_frames: Latents | None = None,
    ) -> None:
        self.latents, self.caption_index = latents, caption_index
        self.captions, self.embeddings = captions, embeddings
        self.image = torch.empty(len(latents), 0, 0) if image is None else image  # (n, m, e), m = 0: there are none
        self.first_frames = first_frames  # (n, 3, h, w), values 0 to 255

    @classmethod
    def open(cls, part: str | Path) -> LatentDataset:
        """A folder such as artifacts/data/train. Raises ValueError if it holds no shards."""
        part = Path(part)
        latents = StoredLatents(part)
        image, first = (StoredLatents(part, name) if latents.has(name) else None for name in (IMAGE, FIRST_FRAME))
        captions = json.loads((part.parent / CAPTIONS).read_text(encoding="utf-8"))
        whole = part.parent / WHOLE_TEXT
        text = load_file(whole)["embeddings"].float() if whole.is_file() else StoredText(part.parent / TEXT)
        return cls(latents, latents.caption_index, captions, text, image, first)

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def text_of_samples(self) -> Selected:
        """Embeddings, indexed as samples are."""
        return Selected(self.embeddings, self.caption_index)

    @property
    def size_index(self) -> torch.Tensor:
        """(n,): samples of one number have one size, and only those can be read together."""
        latents = self.latents
        return latents.size_index if isinstance(latents, StoredLatents) else torch.zeros(len(latents), dtype=torch.int64)

    @property
    def has_several_sizes(self) -> bool:
        return isinstance(self.latents, StoredLatents) and len(self.latents.sizes) > 1

    def of_size(self, height: int, width: int) -> LatentDataset:
        """Samples of the size that has the aspect ratio of height x width, all if there is only one size. Raises ValueError if
        none has it."""
        latents = self.latents
        if not isinstance(latents, StoredLatents) or not self.has_several_sizes:
            return self
        index = self._of_ratio(latents, height, width)[latents.size_index].nonzero()[:, 0]
        if not len(index):
            raise ValueError(f"none of {len(self)} clips is {height} x {width}: take more clips, or another height and width")
        return self._chosen(latents, index)

    def other_sizes(self, height: int, width: int) -> list[LatentDataset]:
        """The samples that `of_size` leaves out, those of each size by themselves."""
        latents = self.latents
        if not isinstance(latents, StoredLatents) or not self.has_several_sizes:
            return []
        numbers = (~self._of_ratio(latents, height, width)).nonzero()[:, 0].tolist()
        return [self._chosen(latents, (latents.size_index == number).nonzero()[:, 0]) for number in numbers]

    @staticmethod
    def _of_ratio(latents: StoredLatents, height: int, width: int) -> torch.Tensor:
        """(sizes,): which of them have the aspect ratio of height x width."""
        return torch.tensor([shape[-2] * width == shape[-1] * height for shape in latents.sizes])

    def _chosen(self, latents: StoredLatents, index: torch.Tensor) -> LatentDataset:
        """Samples of one size."""
        chosen = [
            Selected(rows, index) if isinstance(rows, StoredLatents) else None if rows is None else rows[index]
            for rows in (self.image, self.first_frames)
        ]
        return LatentDataset(Selected(latents, index), self.caption_index[index], self.captions, self.embeddings, *chosen)

    def text(self, index: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, l, d) of samples."""
        return self.text_of_samples[index]

    def caption(self, index: int) -> str:
        return self.captions[int(self.caption_index[index])]

    def batch(
        self, index: torch.Tensor, caption_dropout: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and embeddings of samples; a share `caption_dropout` of the captions is replaced by the empty one."""
        return self.read(index, torch.rand(len(index), generator=generator) < caption_dropout)

    def read(self, index: torch.Tensor, dropped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and embeddings of samples; those `dropped` (n,) have the empty caption."""
        caption = torch.where(dropped, len(self.captions), self.caption_index[index])
        return self.latents[index], self.embeddings[caption]


def save_text(path: Path, embeddings: Sequence[torch.Tensor]) -> None:
    """A shard of embeddings (l, d), whose padding is left out."""
    rows = [without_padding(embedding) for embedding in embeddings]
    offsets = torch.tensor([0, *(len(part) for part in rows)]).cumsum(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {"rows": torch.cat(rows), "offsets": offsets}, {LENGTH: str(len(embeddings[0]))})


def _save_whole_text(shard: Path, embeddings: Sequence[torch.Tensor]) -> None:
    save_tensors(shard.parent.parent / WHOLE_TEXT, {"embeddings": torch.stack(list(embeddings))})


def text_writer(folder: Path, captions: Sequence[str], shard_size: int, share: Share = ALONE) -> ShardWriter:
    """The main process writes captions.json; what is returned holds the embeddings, of the captions and of the empty one.
    Raises ValueError for an empty list or an empty caption."""
    if not captions:
        raise ValueError("there are no captions; at least one clip with a caption is needed")
    if any(not caption.strip() for caption in captions):
        raise ValueError("a caption is empty; the empty caption is added by itself, for guidance")
    few = len(captions) < shard_size  # the embedded data's, whose bytes and results stay what they are
    writer = ShardWriter(folder / TEXT, len(captions) + 1, shard_size, _save_whole_text if few else save_text, share)
    if share.is_main:
        (folder / CAPTIONS).write_text(json.dumps(list(captions), indent=0, ensure_ascii=False), encoding="utf-8")
    return writer


@torch.no_grad()
def write_text(
    writer: ShardWriter,
    pipeline: Any,
    family: Family,
    captions: Sequence[str],
    max_sequence_length: int,
    batch_size: int,
    dtype: torch.dtype,
) -> None:
    """Encode the captions, and the empty one, that `writer` does not have yet."""
    texts = [*captions, ""]
    for span in writer.spans(batch_size):
        if not writer.done(span):
            encoded = family.encode_text(pipeline, texts[span.start : span.stop], max_sequence_length).to("cpu", dtype)
            writer.add(span, dict(zip(span, encoded.unbind(), strict=True)))


@dataclass(frozen=True)
class ClipBatch:
    """Clips (3, t, h, w) in [-1, 1] at `positions` of a part, out of `span`; the others of it could not be read."""

    span: range
    positions: list[int]
    clips: Sequence[torch.Tensor]
    caption_index: torch.Tensor  # (n,)
    skipped: dict[int, tuple[str, str]] = field(default_factory=dict)  # position -> (name, reason)

    def by_size(self) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Positions, and their clips (n, 3, t, h, w), of each size."""
        for shape in dict.fromkeys(clip.shape for clip in self.clips):
            these = [i for i, clip in enumerate(self.clips) if clip.shape == shape]
            yield [self.positions[i] for i in these], torch.stack([self.clips[i] for i in these])


def part_writer(folder: Path, total: int, shard_size: int, share: Share = ALONE) -> ShardWriter:
    def save(path: Path, rows: list[dict[str, torch.Tensor]]) -> None:
        shapes = list(dict.fromkeys(row[LATENTS].shape for row in rows))
        which = torch.tensor([shapes.index(row[LATENTS].shape) for row in rows])
        tensors = {} if len(shapes) == 1 else {SIZES: which}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if len({value.shape for value in values}) == 1:
                tensors[name] = torch.stack(values)
                continue
            for i in range(len(shapes)):
                tensors[f"{name}.{i}"] = torch.stack([values[row] for row in (which == i).nonzero()[:, 0].tolist()])
        save_tensors(path, tensors)

    return ShardWriter(folder, total, shard_size, save, share)


@torch.no_grad()
def write_part(
    writer: ShardWriter,
    pipeline: Any,
    family: Family,
    batches: Iterable[ClipBatch],
    dtype: torch.dtype,
    on_batch: Callable[[int], object] = lambda clips: None,
) -> None:
    """Encode clips into the shards of `writer`. Raises ValueError for latents that are not finite."""
    for batch in batches:
        rows: dict[int, Any] = {}
        captions = dict(zip(batch.positions, batch.caption_index.unbind(), strict=True))
        for positions, clips in batch.by_size():
            encoded = {LATENTS: family.encode_clips(pipeline, clips).to("cpu", dtype)}
            if family.reads_image:
                image = family.encode_image(pipeline, clips).to("cpu", dtype)
                encoded |= ({IMAGE: image} if image.shape[1] else {}) | {FIRST_FRAME: first_frames(clips).cpu()}
            if not all(tensor.isfinite().all() for tensor in encoded.values()):
                raise ValueError(f"{writer.folder.name}: a clip gives NaN or Inf latents; check that its pixels are finite")
            for row, position in enumerate(positions):
                one = {name: tensor[row] for name, tensor in encoded.items()}
                rows[position] = one | {"caption_index": captions[position]}
        writer.add(batch.span, rows, batch.skipped)
        on_batch(len(batch.span))
