"""Stage prepare: clips and captions -> latents and text embeddings, for training, calibration and evaluation.

Reads artifacts/model and the folder of videos; writes artifacts/data (layout in qvgen/data/latents.py), and in
metrics/prepare.json how many clips there are and which could not be read. Held-out clips of the embedded data show digits that
no training clip shows. A run that is interrupted continues after the last whole shard; several processes share the shards.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from stages.runtime.run import Stage, stage_main

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from qvgen.data.latents import ClipBatch
    from qvgen.data.shards import ShardWriter
    from qvgen.params import Params, Prepare

Source = Callable[["ShardWriter"], Iterator["ClipBatch"]]  # the batches of a part that its writer does not have


def run(stage: Stage) -> None:
    import torch

    from qvgen.checkpoint.pipeline import load_parts
    from qvgen.data.latents import part_writer, text_writer, write_part, write_text
    from qvgen.data.remote import Store, replace_shards
    from qvgen.data.shards import remove_records
    from qvgen.device import release_memory
    from qvgen.models.family import ClipSize
    from qvgen.models.noise import check_told
    from qvgen.models.rate import frame_rate
    from qvgen.models.registry import load_family
    from qvgen.models.size import check_size

    settings = stage.params.prepare
    source = stage.root / "artifacts/model"
    for height, width in [(settings.height, settings.width), *settings.buckets]:
        check_size(source, ClipSize(settings.frames, height, width, settings.max_sequence_length))
    family, device, dtype = load_family(source), stage.device, getattr(torch, settings.dtype)
    check_told(family, stage.params.evaluate.guidance_scale)
    fps = None
    if settings.source == "videos" and settings.fps != "native":
        fps = frame_rate(source) if settings.fps is None else settings.fps
    captions, parts = digit_clips(stage.params) if settings.source == "digits" else video_clips(stage.params, fps)
    sizes = {
        "train": settings.train_clips,
        "calibration": settings.calibration_clips,
        "held_out": settings.held_out_clips,
    }
    if settings.store is not None and stage.share.is_main:
        Store(settings.store).check()
    work = stage.checkpoint_dir / "data"
    work.mkdir(exist_ok=True)
    text = text_writer(work, captions, settings.shard_size, stage.share)
    writers = {part: part_writer(work / part, size, settings.shard_size, stage.share) for part, size in sizes.items()}
    if not text.done():
        pipeline = load_parts(source, ("text_encoder",), device)
        write_text(text, pipeline, family, captions, settings.max_sequence_length, settings.batch_size, dtype)
        del pipeline  # before the VAE is loaded
        release_memory(device)
    done = sum(len(span) for writer in writers.values() for span in writer.spans(settings.batch_size) if writer.done(span))
    todo = {part: batches for part, batches in parts.items() if not writers[part].done()}
    with stage.progress(sum(sizes.values()), initial=done, unit="clip") as progress:
        pipeline = load_parts(source, ("vae", "image_encoder"), device) if todo else None
        if pipeline is not None and settings.vae_tiling:
            pipeline.vae.enable_tiling()
        for part, batches in todo.items():
            write_part(writers[part], pipeline, family, limited(batches, writers, part, settings), dtype, progress.update)
    if not stage.share.is_main:
        return
    for writer in (text, *writers.values()):
        writer.wait()
    skipped = {f"{part}: {name}": why for part, writer in writers.items() for name, why in writer.skipped().items()}
    check_skipped(len(skipped), next(iter(skipped.values()), ""), sum(sizes.values()), settings)  # those of all processes
    read = {part: size - len(writers[part].skipped()) for part, size in sizes.items()}
    if empty := [part for part, count in read.items() if not count]:
        raise ValueError(f"{empty[0]}: there are no clips, none of {sizes[empty[0]]} could be read")
    buckets = {part: clips_of_buckets(work / part, settings) for part in sizes} if settings.buckets else {}
    # Before `work` is the output too: what is made is not lost where the network is.
    indices = {} if settings.store is None else upload(stage, work, settings.store)
    with stage.outputs("artifacts/data") as folder:
        # Hidden are drafts of a process that was killed.
        shutil.copytree(work, folder, copy_function=link, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
        remove_records(folder)
        for name, index in indices.items():
            replace_shards(folder / name, index)
    summary = {"clips": read, "captions": len(captions), "skipped": len(skipped), "reasons": skipped}
    summary |= {"buckets": buckets} if buckets else {}
    with stage.outputs("metrics/prepare.json") as path:
        path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    rate = {} if fps is None else {"fps": fps}
    counts = {"captions": len(captions), "skipped": len(skipped)}
    stage.log_metrics({f"clips.{part}": n for part, n in read.items()} | counts | rate)


def link(made: str, place: str) -> None:
    """The file by another name, on another disk a copy: a run that is stopped before its end goes on with `made`."""
    try:
        os.link(made, place)
    except OSError:
        shutil.copy2(made, place)


def upload(stage: Stage, work: Path, store: str) -> dict[str, Any]:
    """Folder -> its shards.json, of all folders in `work` that hold shards."""
    from qvgen.data.remote import upload_shards

    shards = list(work.glob("*/shard-*.safetensors"))
    with stage.progress(len(shards), unit="shard") as progress:
        return {folder.name: upload_shards(folder, store, progress.update) for folder in {path.parent for path in shards}}


def clips_of_buckets(part: Path, settings: Prepare) -> dict[str, int]:
    """{"480x832": clips}. Raises ValueError if no held-out clip has the size of the videos that are made."""
    from qvgen.data.stored import StoredLatents

    stored, found = StoredLatents(part), {}
    counts = stored.size_index.bincount(minlength=len(stored.sizes)).tolist()
    for height, width in settings.buckets:
        of_ratio = [n for n, shape in zip(counts, stored.sizes, strict=True) if shape[-2] * width == shape[-1] * height]
        found[f"{height}x{width}"] = sum(of_ratio)
    if part.name == "held_out" and not found[f"{settings.height}x{settings.width}"]:
        raise ValueError(
            f"no held-out clip is {settings.height} x {settings.width}, which evaluation measures ({found}): raise "
            "prepare.held_out_clips, or make prepare.height and width those of a bucket that has some"
        )
    return found


def limited(source: Source, writers: dict[str, ShardWriter], part: str, settings: Any) -> Iterator[ClipBatch]:
    """The batches of a part. The main process raises ValueError once more clips are left out than `prepare.max_skipped`
    allows, and looks again when all have made their shards: so nobody waits for one that gave up."""
    planned = sum(writer.total for writer in writers.values())
    before = sum(len(writer.skipped()) for writer in writers.values())
    for batch in source(writers[part]):
        before += len(batch.skipped)
        if batch.skipped and writers[part].share.is_main:
            check_skipped(before, next(iter(batch.skipped.values()))[1], planned, settings)
        yield batch


def check_skipped(count: int, reason: str, planned: int, settings: Prepare) -> None:
    if count > settings.max_skipped * planned:
        raise ValueError(
            f"{reason} ({count} of {planned} clips cannot be read, prepare.max_skipped = {settings.max_skipped:g} allows "
            f"{int(settings.max_skipped * planned)}: replace it, or raise prepare.max_skipped to leave such videos out)"
        )


def digit_clips(params: Params) -> tuple[list[str], dict[str, Source]]:
    """Clips of the embedded data; captions recur equally often, in random order."""
    import torch

    from qvgen.data.digits import ALL_ATTRIBUTES, FRAMES, SIZE, sample_clips
    from qvgen.data.latents import ClipBatch

    settings = params.prepare
    if (settings.frames, settings.height, settings.width) != (FRAMES, SIZE, SIZE):
        raise ValueError(
            f"source digits makes clips of {FRAMES} frames of {SIZE}x{SIZE}, prepare asks for {settings.frames} frames of "
            f"{settings.height}x{settings.width}"
        )

    def source(part: int, held_out: bool) -> Source:
        def batches(writer: ShardWriter) -> Iterator[ClipBatch]:
            generator = torch.Generator().manual_seed(3 * params.seed + part)
            rounds = -(-writer.total // len(ALL_ATTRIBUTES))
            order = torch.cat([torch.randperm(len(ALL_ATTRIBUTES), generator=generator) for _ in range(rounds)])
            for span in writer.spans(settings.batch_size):
                index = order[span.start : span.stop]
                # Those that are done too: the next ones are drawn after them.
                clips = sample_clips([ALL_ATTRIBUTES[i] for i in index], generator, held_out=held_out)
                if not writer.done(span):
                    yield ClipBatch(span, list(span), clips.unbind(), index)

        return batches

    return [a.caption for a in ALL_ATTRIBUTES], {
        "train": source(0, held_out=False),
        "calibration": source(1, held_out=False),
        "held_out": source(2, held_out=True),
    }


def video_clips(params: Params, fps: float | None) -> tuple[list[str], dict[str, Source]]:
    """Clips of a folder of videos, split at random: no video is in two parts. `fps`: frames a second; None: every frame."""
    import torch

    from qvgen.data.captions import read_captions
    from qvgen.data.latents import ClipBatch
    from qvgen.data.videos import Place, read_clip
    from qvgen.models.family import ClipSize

    settings, each = params.prepare, params.prepare.clips_per_video
    assert settings.folder is not None
    rows = read_captions(settings.folder)
    clips = (settings.held_out_clips, settings.calibration_clips, settings.train_clips)
    counts = [-(-count // each) for count in clips]  # of videos
    if sum(counts) > len(rows):
        raise ValueError(
            f"{settings.folder} has {len(rows)} videos, params.yaml asks for {sum(counts)} in all parts together "
            f"({each} clips of each)"
        )
    captions = sorted({caption for _, caption in rows})
    number = {caption: i for i, caption in enumerate(captions)}
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(params.seed))[: sum(counts)]
    shapes = settings.buckets or [(settings.height, settings.width)]
    sizes = [ClipSize(settings.frames, height, width, settings.max_sequence_length) for height, width in shapes]

    def source(index: torch.Tensor) -> Source:
        videos = [rows[i] for i in index]

        def read(position: int) -> torch.Tensor | tuple[str, str]:
            path, place = videos[position // each][0], Place(settings.start, position % each, each, params.seed)
            try:
                return read_clip(path, sizes, fps, place)
            except ValueError as error:
                name = path.relative_to(settings.folder or "").as_posix()
                reason = str(error).replace(str(path), name)  # the same wherever the folder lies
                return name if each == 1 else f"{name} clip {place.number}", reason

        def batches(writer: ShardWriter) -> Iterator[ClipBatch]:
            spans = [span for span in writer.spans(settings.batch_size) if not writer.done(span)]
            found = read_ahead(read, [position for span in spans for position in span], params.compute.workers)
            for span in spans:
                seen = {position: next(found) for position in span}
                good = {i: clip for i, clip in seen.items() if isinstance(clip, torch.Tensor)}
                bad = {i: why for i, why in seen.items() if not isinstance(why, torch.Tensor)}
                index = torch.tensor([number[videos[i // each][1]] for i in good])
                yield ClipBatch(span, list(good), list(good.values()), index, bad)

        return batches

    held_out, calibration, train = order.split(counts)
    return captions, {"train": source(train), "calibration": source(calibration), "held_out": source(held_out)}


def read_ahead(read: Callable[[int], Any], items: Sequence[int], workers: int) -> Iterator[Any]:
    """Results in order, with `workers` threads ahead of whoever takes them, two results each: FFmpeg is not bound to one."""
    if not workers:
        yield from map(read, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


if __name__ == "__main__":
    stage_main("prepare", run, shared=True)
