"""What a served model may be asked for, and gives. Imports nothing heavy: stage register writes the limits down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_STEPS = 1000
SUFFIXES = {"video": ".mp4", "image": ".png"}  # by what a model makes
STEPS_OVER_DEFAULT = 5  # times the model's own number of steps


class LimitError(ValueError):
    """A request beyond a limit; the message names it."""


@dataclass(frozen=True)
class Limits:
    """Of one request. More pixels than the model's own clip were never measured and take more memory than it was given."""

    steps: int
    pixels: int  # frames x height x width
    characters: int = 2000  # of a prompt
    videos: int = 4
    image_bytes: int = 8 << 20  # of the file of a first frame

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Limits:
        """From the model's own settings (generation.json)."""
        steps = min(MOST_STEPS, STEPS_OVER_DEFAULT * int(settings["inference_steps"]))
        return cls(steps, int(settings["frames"]) * int(settings["height"]) * int(settings["width"]))

    def check(self, *, steps: int, frames: int, height: int, width: int, prompts: tuple[str, ...]) -> None:
        """Raises LimitError."""
        if steps > self.steps:
            raise LimitError(f"limit steps = {self.steps}: {steps} asked for")
        if (pixels := frames * height * width) > self.pixels:
            raise LimitError(f"limit pixels = {self.pixels}: frames x height x width = {pixels} asked for")
        for prompt in prompts:
            if len(prompt) > self.characters:
                raise LimitError(f"limit characters = {self.characters}: a prompt of {len(prompt)}")

    def check_image(self, size: int) -> None:
        """Raises LimitError."""
        if size > self.image_bytes:
            raise LimitError(f"limit image_bytes = {self.image_bytes}: an image of {size}")
