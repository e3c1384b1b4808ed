"""A loaded model that makes one video, or image, after the other for any number of threads.

On a CPU a video takes every core, a VAE keeps its own state while it decodes, and a second video at once would take as much
memory again. So requests wait for their turn, and more than `waiting` at once are refused.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvgen.serving.limits import SUFFIXES, Limits

WAITING = int(os.environ.get("QVGEN_WAITING", "16"))  # requests that may wait for their turn
# Whether the client of a thread's request has gone; MLflow, which lies between, hands nothing on.
client_gone: ContextVar[Callable[[], bool]] = ContextVar("client_gone", default=lambda: False)
LOOK = 0.2  # seconds between looks whether it has


class BusyError(RuntimeError):
    """As many requests wait as may, and the message names the limit; or nobody waits for this one any more."""


class Turns:
    """One at a time, in the order in which they came, and a bounded number that wait."""

    def __init__(self, waiting: int) -> None:
        self.limit = waiting
        self._line: list[object] = []
        self._moved = threading.Condition()

    @property
    def queue(self) -> int:
        """Requests inside: the one that runs and those that wait."""
        return len(self._line)

    @contextmanager
    def take(self) -> Any:
        """Raises BusyError instead of waiting where `limit` wait already, and when the client goes while it waits."""
        own = object()
        with self._moved:
            if len(self._line) > self.limit:
                raise BusyError(f"limit waiting = {self.limit} (QVGEN_WAITING): as many requests wait; try again later")
            self._line.append(own)
        try:
            with self._moved:
                while self._line[0] is not own:
                    self._moved.wait(LOOK)
                    if client_gone.get()():
                        raise BusyError("the client has gone")
            yield
        finally:
            with self._moved:
                self._line.remove(own)
                self._moved.notify_all()


@dataclass(frozen=True)
class Order:
    """One video that was asked for, checked. `settings`: a SamplingSettings; `image`: its first frame (3, h, w) uint8."""

    prompt: str
    seed: int
    negative_prompt: str
    settings: Any
    image: Any = None


class Engine:
    """The pipeline of a folder, its limits, and its turns.

    Engines that share `turns` make one video at a time between them. `on_video` gets the seconds that each took.
    """

    def __init__(
        self,
        folder: str | Path,
        limits: Limits | None = None,
        turns: Turns | None = None,
        on_video: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        from qvgen.checkpoint.pipeline import load_pipeline
        from qvgen.models.family import IMAGES
        from qvgen.models.registry import load_family
        from qvgen.sampling.settings import read_settings

        self.folder, self.turns, self._on_video = Path(folder), turns or Turns(WAITING), on_video
        family = load_family(folder)
        self.reads_image, self.makes = family.reads_image, "image" if family.task == IMAGES else "video"
        self.limits = limits or Limits.of(vars(read_settings(folder)))
        self._family, self._pipeline = family, load_pipeline(folder)

    def order(
        self, prompt: str, seed: int, negative_prompt: str, overrides: Mapping[str, Any], image: bytes | None = None
    ) -> Order:
        """`image`: the file of the first frame, for models that read one. Raises ValueError for what cannot be sampled, and
        LimitError."""
        from qvgen.sampling.first_frame import decode_first_frame
        from qvgen.sampling.settings import check_seed, read_settings

        if not prompt.strip():
            raise ValueError("the prompt is empty: say what the video shows")
        check_seed(seed)
        given = {name: value for name, value in overrides.items() if value is not None}
        wanted = vars(read_settings(self.folder)) | given
        numbers = {name: wanted[name] for name in ("frames", "height", "width")}
        for name, value in (numbers | {"inference_steps": wanted["inference_steps"]}).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {value!r:.100} must be a whole number, at least 1")
        self.limits.check(steps=wanted["inference_steps"], prompts=(prompt, negative_prompt), **numbers)
        settings = read_settings(self.folder, given)
        if self.reads_image != (image is not None):
            needed = (
                "makes a video from its first frame: give it as image" if self.reads_image else "reads no image: leave it out"
            )
            raise ValueError(f"this model {needed}")
        if image is None:
            return Order(prompt, seed, negative_prompt, settings)
        self.limits.check_image(len(image))
        return Order(prompt, seed, negative_prompt, settings, decode_first_frame(image, settings))

    def make(self, orders: Sequence[Order]) -> list[bytes]:
        """In one turn, an .mp4 for each, or a .png of a model that makes images: the one that `qvgen generate` writes for the
        same arguments. Raises BusyError."""
        with self.turns.take():
            return [self._one(order) for order in orders]

    def _one(self, order: Order) -> bytes:
        from qvgen.sampling.clip import own_scheduler, sample_clip
        from qvgen.sampling.video import write_video

        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            scheduled = own_scheduler(self._pipeline)
            clip = sample_clip(
                scheduled, self._family, order.settings, order.prompt, order.seed, order.negative_prompt, order.image
            )
            path = Path(folder) / f"made{SUFFIXES[self.makes]}"
            write_video(path, clip, order.settings.fps)
            video = path.read_bytes()
        self._on_video(time.monotonic() - started)
        return video
