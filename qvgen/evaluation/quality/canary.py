"""Videos that a packed model is known by: made when it is measured, made again where it serves, and compared.

The folder holds 0.mp4, 1.mp4, ... as `qvgen generate` writes them, and canary.json: prompts, seeds, settings, the sha256 of
each file, and what they were made with. Of a model that makes videos from a first frame 0.png, 1.png, ... lie beside, and
their sha256 in the record. On the same processor, kernel, threads and torch the same bytes must come out. Where one of these
differs, sums are rounded otherwise and a code of an activation may fall to the other side, so another limit holds:
LEAST_PSNR_DB for every video.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvgen.hub.artifacts import CANARY_RECORD as RECORD
from qvgen.models.family import SamplingSettings
from qvgen.models.files import read_json

VIDEOS = 12
LEAST_PSNR_DB = 25.0  # LOG.md: between two kernels at least 30.8 was measured
OnVideo = Callable[[int], object]


@dataclass(frozen=True)
class Outcome:
    """What came of the comparison. `worst_psnr_db`: of all videos, infinite if all bytes are equal."""

    ok: bool
    equal: int  # videos of the same bytes
    videos: int
    worst_psnr_db: float
    differing: tuple[str, ...]  # names of circumstances: cpu, kernel, threads, torch

    def __str__(self) -> str:
        verdict = "as registered" if self.ok else "NOT as registered"
        if self.equal == self.videos:
            return f"{verdict}: all {self.videos} videos bit-equal"
        other = f"; other {', '.join(self.differing)}" if self.differing else ""
        limit = f"at least {LEAST_PSNR_DB:g} dB" if self.differing else "bit-equal"
        found = f"{self.equal} of {self.videos} videos bit-equal, the worst {self.worst_psnr_db:.1f} dB"
        return f"{verdict}: {found} (must be {limit}{other})"


def make_canary(
    folder: Path,
    out: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplingSettings,
    on_video: OnVideo = lambda count: None,
    images: Any = None,
) -> dict[str, Any]:
    """Make the videos of the pipeline in `folder`, one at a time, and write them and their record into `out`, a folder that
    is there. `images`: first frames (n, 3, h, w), values 0 to 255, if the model takes any. Returns the record."""
    from qvgen.checkpoint.pipeline import PipelineFolder
    from qvgen.models.registry import load_family
    from qvgen.sampling.sample import sample
    from qvgen.sampling.video import write_video

    made_with: dict[str, str] = {}
    _latents, clips = sample(
        PipelineFolder(folder),
        load_family(folder),
        prompts,
        seeds,
        settings.size,
        inference_steps=settings.inference_steps,
        guidance_scale=settings.guidance_scale,
        batch_size=1,
        guidance_stop=settings.guidance_stop,
        on_batch=on_video,
        on_denoised=lambda transformer: made_with.update(circumstances(transformer)),
        images=images,
    )
    hashes = []
    for number, clip in enumerate(clips):
        path = out / f"{number}.mp4"
        write_video(path, clip, settings.fps)
        hashes.append(hashlib.sha256(path.read_bytes()).hexdigest())
    record = {
        "prompts": list(prompts),
        "seeds": list(seeds),
        "settings": asdict(settings),
        "sha256": hashes,
        "made_with": made_with,
    }
    if images is not None:
        record["images"] = [_write_picture(out / f"{number}.png", image) for number, image in enumerate(images)]
    (out / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return record


def circumstances(transformer: Any) -> dict[str, str]:
    """What the bytes of a video depend on besides the model."""
    from qvgen.evaluation.cost.hardware import hardware, kernel_name

    facts = hardware()
    return {
        "cpu": str(facts["cpu"]),
        "kernel": kernel_name(transformer) or "none",
        "threads": str(facts["threads"]),
        "torch": str(facts["torch"]),
    }


def check_canary(folder: Path, known: Path, out: Path, on_video: OnVideo = lambda count: None) -> Outcome:
    """Make the videos of `known` again with the pipeline in `folder`, into `out`, and compare.

    Raises ValueError for a record that is damaged or whose videos are not the recorded ones.
    """
    record = read_canary(known)
    settings = SamplingSettings(**record["settings"])
    images = _read_pictures(known, record["images"]) if "images" in record else None
    made = make_canary(folder, out, record["prompts"], record["seeds"], settings, on_video, images)
    differing = tuple(name for name, value in made["made_with"].items() if record["made_with"].get(name) != value)
    equal = [a == b for a, b in zip(made["sha256"], record["sha256"], strict=True)]
    found = (math.inf if same else _psnr_db(known / f"{n}.mp4", out / f"{n}.mp4") for n, same in enumerate(equal))
    worst = min(found, default=math.inf)
    ok = all(equal) or (bool(differing) and worst >= LEAST_PSNR_DB)
    return Outcome(ok, sum(equal), len(equal), worst, differing)


def read_canary(known: Path) -> dict[str, Any]:
    """The record of a folder of such videos, whose files are those it names. Raises ValueError."""
    record = read_json(known / RECORD, "so there is nothing to compare with")
    try:
        SamplingSettings(**record["settings"])
        lists = [record[name] for name in ("prompts", "seeds", "sha256", "images") if name != "images" or name in record]
        if len({len(entries) for entries in lists}) != 1 or not lists[0] or not isinstance(record["made_with"], dict):
            raise ValueError("lists of different lengths, or empty")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{known / RECORD} is damaged ({error})") from None
    for kind, suffix, what in (("sha256", "mp4", "video"), ("images", "png", "picture")):
        for number, sha256 in enumerate(record.get(kind, [])):
            path = known / f"{number}.{suffix}"
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
                raise ValueError(f"{path} is missing, or not the {what} that {RECORD} names")
    return record


def _write_picture(path: Path, picture: Any) -> str:
    """Write a picture (3, h, w) and return the sha256 of the file."""
    import torch

    from qvgen.models.pictures import as_image

    as_image(picture.to(torch.uint8)).save(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_pictures(known: Path, hashes: Sequence[str]) -> Any:
    import numpy as np
    import torch
    from PIL import Image

    found = [np.array(Image.open(known / f"{number}.png").convert("RGB")) for number in range(len(hashes))]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


def _psnr_db(reference: Path, candidate: Path) -> float:
    """Of the decoded frames; of files with different shapes minus infinity."""
    from qvgen.evaluation.quality.similarity import psnr_db

    clips = [_decode(path) for path in (reference, candidate)]
    return float(psnr_db(clips[0][None], clips[1][None])) if clips[0].shape == clips[1].shape else -math.inf


def _decode(path: Path) -> Any:
    """(3, t, h, w) in [-1, 1]."""
    import av
    import torch

    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(frames).permute(3, 0, 1, 2).float() / 127.5 - 1
