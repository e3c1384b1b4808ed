"""Stage prepare: clips and captions -> latents and text embeddings, for training, calibration and evaluation.

Reads artifacts/model; writes artifacts/data (layout in qvgen/data/latents.py). Held-out clips of the embedded data show
digits that no training clip shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from stages.runtime.run import Stage, stage_main

if TYPE_CHECKING:
    import torch

    from qvgen.params import Params

Batches = Iterator[tuple["torch.Tensor", "torch.Tensor"]]


def run(stage: Stage) -> None:
    from qvgen.checkpoint.pipeline import load_parts
    from qvgen.data.latents import write_part, write_text
    from qvgen.device import release_memory
    from qvgen.models.family import ClipSize
    from qvgen.models.rate import frame_rate
    from qvgen.models.registry import load_family
    from qvgen.models.size import check_size

    settings = stage.params.prepare
    source = stage.root / "artifacts/model"
    check_size(source, ClipSize(settings.frames, settings.height, settings.width, settings.max_sequence_length))
    family, device = load_family(source), stage.device
    fps = None
    if settings.source == "videos" and settings.fps != "native":
        fps = frame_rate(source) if settings.fps is None else settings.fps
    captions, parts = digit_clips(stage.params) if settings.source == "digits" else video_clips(stage.params, fps)
    sizes = {
        "train": settings.train_clips,
        "calibration": settings.calibration_clips,
        "held_out": settings.held_out_clips,
    }
    with stage.outputs("artifacts/data") as folder, stage.progress(sum(sizes.values()), unit="clip") as progress:
        pipeline = load_parts(source, ("text_encoder",), device)
        write_text(folder, pipeline, family, captions, settings.max_sequence_length, settings.batch_size)
        del pipeline  # before the VAE is loaded
        release_memory(device)
        pipeline = load_parts(source, ("vae",), device)
        for part, batches in parts.items():
            write_part(folder / part, pipeline, family, batches, settings.shard_size, progress.update)
    rate = {} if fps is None else {"fps": fps}
    stage.log_metrics({f"clips.{part}": n for part, n in sizes.items()} | {"captions": len(captions)} | rate)


def digit_clips(params: Params) -> tuple[list[str], dict[str, Batches]]:
    """Clips of the embedded data; captions recur equally often, in random order."""
    import torch

    from qvgen.data.digits import ALL_ATTRIBUTES, FRAMES, SIZE, sample_clips

    settings = params.prepare
    if (settings.frames, settings.height, settings.width) != (FRAMES, SIZE, SIZE):
        raise ValueError(
            f"source digits makes clips of {FRAMES} frames of {SIZE}x{SIZE}, prepare asks for {settings.frames} frames of "
            f"{settings.height}x{settings.width}"
        )

    def batches(part: int, count: int, held_out: bool) -> Batches:
        generator = torch.Generator().manual_seed(3 * params.seed + part)
        rounds = -(-count // len(ALL_ATTRIBUTES))
        order = torch.cat([torch.randperm(len(ALL_ATTRIBUTES), generator=generator) for _ in range(rounds)])[:count]
        for index in order.split(settings.batch_size):
            yield sample_clips([ALL_ATTRIBUTES[i] for i in index], generator, held_out=held_out), index

    return [a.caption for a in ALL_ATTRIBUTES], {
        "train": batches(0, settings.train_clips, held_out=False),
        "calibration": batches(1, settings.calibration_clips, held_out=False),
        "held_out": batches(2, settings.held_out_clips, held_out=True),
    }


def video_clips(params: Params, fps: float | None) -> tuple[list[str], dict[str, Batches]]:
    """Clips of a folder of videos, split at random: no video is in two parts. `fps`: frames a second; None: every frame."""
    import torch

    from qvgen.data.videos import read_captions, read_clip
    from qvgen.models.family import ClipSize

    settings = params.prepare
    assert settings.folder is not None
    rows = read_captions(settings.folder)
    counts = (settings.held_out_clips, settings.calibration_clips, settings.train_clips)
    if sum(counts) > len(rows):
        raise ValueError(f"{settings.folder} has {len(rows)} videos, params.yaml asks for {sum(counts)} in all parts together")
    captions = sorted({caption for _, caption in rows})
    number = {caption: i for i, caption in enumerate(captions)}
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(params.seed))[: sum(counts)]
    size = ClipSize(settings.frames, settings.height, settings.width, settings.max_sequence_length)

    def batches(index: torch.Tensor) -> Batches:
        for some in index.split(settings.batch_size):
            chosen = [rows[i] for i in some]
            yield (
                torch.stack([read_clip(path, size, fps) for path, _ in chosen]),
                torch.tensor([number[c] for _, c in chosen]),
            )

    held_out, calibration, train = order.split(counts)
    return captions, {"train": batches(train), "calibration": batches(calibration), "held_out": batches(held_out)}


if __name__ == "__main__":
    stage_main("prepare", run)
