"""`qvgen generate --prompts`: several videos for each prompt of a list, in one folder that VBench reads.

A run can be killed at any time and goes on when it is run again. What a video shows depends on the model, the settings and
its own seed only: not on the order of the prompts, on other processes, or on what was there before.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.commands.generate.manifest import claim, model_hash, record_names
from qvgen.sampling.folder import SAMPLES, read_prompts, short_names, video_name, video_seed

if TYPE_CHECKING:
    from qvgen.models.family import SamplingSettings

_TEMPORARY = re.compile(r"\.(.+)\.(\d+)\.mp4")  # what write_video calls a file until it is whole


@dataclass(frozen=True)
class Batch:
    """Videos that are sampled together, always the same ones: floating-point sums may depend on the batch."""

    prompt: str
    samples: tuple[int, ...]

    def missing(self, folder: Path) -> list[int]:
        """Its samples without a file in `folder`. A file of no bytes is what a power failure leaves."""
        paths = {sample: folder / video_name(self.prompt, sample) for sample in self.samples}
        return [sample for sample, path in paths.items() if not path.is_file() or path.stat().st_size == 0]


@dataclass(frozen=True)
class Task:
    """What every process is told."""

    model: Path
    out: Path
    settings: SamplingSettings
    seed: int
    threads: int


@dataclass(frozen=True)
class Done:
    """Videos in the folder that belong to this run (or to its shard): made now, and kept from before."""

    made: int
    kept: int


def generate_folder(
    model: Path,
    prompts: Path,
    out: Path,
    seed: int = 0,
    *,
    samples: int = SAMPLES,
    batch_size: int = 1,
    processes: int = 1,
    threads: int | None = None,
    shard: str | None = None,
    **overrides: Any,
) -> Done:
    """Write `out/{prompt}-{0..samples-1}.mp4` for each prompt of the file `prompts`; what is there already is kept. A prompt
    that cannot name a file gets a short name (qvgen/sampling/folder.py), which the manifest maps to it.

    Its manifest (manifest.py) ties the folder to one model, seed and settings. `threads`: per process;
    None: as the manifest says, in a new folder this process's divided by `processes`. `shard` "2/5": the second of five
    parts of the work, which other machines may do at the same time. `overrides`: fields of SamplingSettings;
    None means the model's. Raises ValueError or OSError with a message for people.
    """
    from qvgen.models.family import IMAGES
    from qvgen.models.registry import load_family
    from qvgen.sampling.settings import check_seed, read_settings

    check_seed(seed)
    for name, value in {"samples": samples, "batch_size": batch_size, "processes": processes, "threads": threads}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value} must be at least 1")
    if samples % batch_size:
        raise ValueError(f"batches of {batch_size} do not divide {samples} samples of a prompt evenly: choose a divisor")
    listed = read_prompts(prompts)
    part, parts = parse_shard(shard)
    settings = read_settings(model, overrides)
    family = load_family(model)
    if family.reads_image:
        raise ValueError("this model makes each video from a first frame, which a list of prompts does not have: use --prompt")
    if family.task == IMAGES:
        raise ValueError("this model makes images, and a list of prompts gives videos: use --prompt")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; with --prompts, --out names the folder of the videos")
    identity = {"model": model_hash(model), "seed": seed, "batch_size": batch_size, "settings": asdict(settings)}
    threads = claim(out, identity, threads, processes)
    record_names(out, short_names(listed))

    ranges = [tuple(range(start, start + batch_size)) for start in range(0, samples, batch_size)]
    batches = [Batch(prompt, numbers) for prompt in listed for numbers in ranges][part - 1 :: parts]
    pending = [batch for batch in batches if batch.missing(out)]
    _remove_leftovers(out, batches)
    made = sum(len(batch.missing(out)) for batch in pending)
    kept = len(batches) * batch_size - made
    task = Task(model, out, settings, seed, threads)
    run = _here if processes == 1 else lambda *arguments: _in_processes(*arguments, processes=processes)
    from tqdm import tqdm

    with tqdm(total=made + kept, initial=kept, unit="video", disable=not sys.stderr.isatty()) as bar:
        run(task, pending, bar.update)
    _remove_leftovers(out, batches)  # of processes that were still dying when this one began
    return Done(made, kept)


def parse_shard(shard: str | None) -> tuple[int, int]:
    """(i, n) of "i/n", (1, 1) of None. Raises ValueError unless 1 <= i <= n."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard or "1/1")
    part, parts = map(int, match.groups()) if match else (0, 0)
    if not 1 <= part <= parts:
        raise ValueError(f"shard {shard!r} must be i/n with 1 <= i <= n: 2/5 is the second of five parts")
    return part, parts


def _remove_leftovers(out: Path, batches: list[Batch]) -> None:
    """Delete half-written files of `batches` that a killed process left; another run may be making the same ones now."""
    ours = {Path(video_name(batch.prompt, sample)).stem for batch in batches for sample in batch.samples}
    for path in out.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match and match[1] in ours and not _runs(int(match[2])):
            path.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie, which a killed one stays until somebody asks for its exit code."""
    import psutil

    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _here(task: Task, batches: list[Batch], on_videos: Callable[[int], object]) -> None:
    import torch

    if not batches:
        return
    before = torch.get_num_threads()
    torch.set_num_threads(task.threads)
    try:
        sample = _sampler(task)
        for batch in batches:
            on_videos(sample(batch))
    finally:
        torch.set_num_threads(before)


def _in_processes(task: Task, batches: list[Batch], on_videos: Callable[[int], object], processes: int) -> None:
    """Hand each process a batch whenever it is free. They end with this one, however it ends: their pipe closes."""
    import multiprocessing
    from multiprocessing.connection import wait

    context, queue, workers = multiprocessing.get_context("spawn"), iter(batches), {}
    try:
        for _, batch in zip(range(processes), queue, strict=False):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs, task), daemon=True)
            with _openmp_threads(task.threads):
                worker.start()
            theirs.close()
            workers[ours] = worker
            ours.send(batch)
        while workers:
            for connection in wait(list(workers)):
                worker = workers[connection]
                try:
                    answer = connection.recv()  # type: ignore[union-attr]  (sockets and handles are for others)
                    if isinstance(answer, str):
                        raise ValueError(answer)
                    on_videos(answer)
                    batch = next(queue, None)
                    connection.send(batch)  # type: ignore[union-attr]
                except (EOFError, BrokenPipeError, ConnectionResetError):
                    worker.join()
                    raise OSError(
                        f"a process ended unexpectedly with code {worker.exitcode} (-9: killed, often for want of memory); "
                        f"run again to go on, with fewer than {processes} processes if memory is short"
                    ) from None
                if batch is None:
                    workers.pop(connection).join()
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.join()


def _work(connection: Any, task: Task) -> None:
    """Sample the batches that come through `connection` until None does or it closes; answer with a count or an error."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process stops the others
    torch.set_num_threads(task.threads)
    sample = None
    try:
        while (batch := connection.recv()) is not None:
            try:
                sample = sample or _sampler(task)
                answer: int | str = sample(batch)
            except Exception as error:
                answer = f"{batch.prompt!r}: {type(error).__name__}: {error}"
            connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _sampler(task: Task) -> Callable[[Batch], int]:
    """Loads the model; the function returned samples a batch, writes the files that are missing and returns their number."""
    from qvgen.checkpoint.pipeline import load_pipeline
    from qvgen.device import resolve_device
    from qvgen.models.registry import load_family
    from qvgen.sampling.sample import sample
    from qvgen.sampling.video import write_video

    family, pipeline = load_family(task.model), load_pipeline(task.model, device=resolve_device())
    settings = task.settings

    def write(batch: Batch) -> int:
        wanted = batch.missing(task.out)
        _latents, clips = sample(
            pipeline,
            family,
            [batch.prompt] * len(batch.samples),
            [video_seed(task.seed, batch.prompt, number) for number in batch.samples],
            settings.size,
            inference_steps=settings.inference_steps,
            guidance_scale=settings.guidance_scale,
            guidance_stop=settings.guidance_stop,
            batch_size=len(batch.samples),
        )
        for number, clip in zip(batch.samples, clips, strict=True):
            if number in wanted:
                write_video(task.out / video_name(batch.prompt, number), clip, settings.fps)
        return len(wanted)

    return write


@contextmanager
def _openmp_threads(count: int) -> Iterator[None]:
    """Processes started inside read OMP_NUM_THREADS = `count` when their libraries load."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
