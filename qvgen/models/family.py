"""The protocol of a family of diffusion transformers: every question that the library asks about one.

A family is one file (wan/text.py, wan/image.py, wan/vace.py, cogvideox.py, ltx/text.py, pixart/text.py): everything that is
true of it and of no other stands there. registry.py knows the families by the diffusers pipelines they belong to;
docs/add-a-family.md adds one step by step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import nn

from qvgen.models.folding import FoldableInput
from qvgen.models.pictures import as_image

_NOTHING: Mapping[str, Any] = MappingProxyType({})
IMAGES = "text-to-image"
NUM_TRAIN_TIMESTEPS = 1000  # the library numbers noise levels 0 (clean) to 1000 (noise); a family with others is refused


@dataclass(frozen=True)
class ClipSize:
    """Frames and pixels of a clip, and the number of text tokens the model was trained with."""

    frames: int
    height: int
    width: int
    max_sequence_length: int


@dataclass(frozen=True)
class ClipStep:
    """Sizes that a model has latents for: `frames` k + 1 frames (None: one frame, an image), whole multiples of `height` and
    `width` pixels."""

    frames: int | None
    height: int
    width: int


@dataclass(frozen=True)
class SamplingSettings:
    """How a model is sampled: the entries of generation.json, and of the flags of `qvgen generate` that override them."""

    frames: int
    height: int  # pixels
    width: int
    max_sequence_length: int  # text tokens the model was trained with
    inference_steps: int
    guidance_scale: float
    fps: int
    guidance_stop: float = 1.0  # cleanness from which sampling goes on without guidance, in (0, 1]; 1: never

    @property
    def size(self) -> ClipSize:
        return ClipSize(self.frames, self.height, self.width, self.max_sequence_length)


class Family(Protocol):
    """Adapter of one family. Latents have whatever layout the transformer takes; only the adapter looks inside.

    `config` arguments are the contents of a component's config.json; a missing entry has the default of diffusers.
    """

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]  # class names of the diffusers pipelines that are of this family
    default_targets: ClassVar[tuple[str, ...]]  # linear layers of the transformer blocks, as patterns of QuantScheme
    sampling: ClassVar[SamplingSettings]  # of the family's own pipeline, for folders without generation.json
    guidance_can_stop: ClassVar[bool]  # whether the pipeline asks for guidance at each step, not once before the first
    scheduler_options: ClassVar[Mapping[str, tuple[Any, ...]]]  # option -> values for which the equations below hold
    published: ClassVar[tuple[str, Mapping[str, Any]]]  # a published model: its name in metrics, its transformer's config
    task: ClassVar[str] = "text-to-video"  # what the hub calls it; of image models IMAGES
    optional: ClassVar[tuple[str, ...]] = ()  # components that its pipelines may have besides those of source.py
    reads_image: ClassVar[bool] = False  # whether its pipelines are also given the first frame

    component: str = "transformer"  # the transformer that is trained and measured, of a pipeline with two
    noise_range: tuple[float, float] = (0.0, 1.0)  # the noise levels (t / 1000) that this transformer denoises

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any], index: Mapping[str, Any] = _NOTHING) -> Self:
        """The adapter for a pipeline with this scheduler, whose options were checked against `scheduler_options`. `index`:
        the pipeline's own settings, as in model_index.json."""
        ...

    @staticmethod
    def refusal(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> str | None:
        """Why a pipeline of this family cannot go through the stages, in words; None if it can. `index`: model_index.json."""
        ...

    @staticmethod
    def clip_step(transformer_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> ClipStep:
        """Which clips have latents that the transformer takes whole."""
        ...

    @staticmethod
    def text_tokens(transformer_config: Mapping[str, Any]) -> int | None:
        """The number of text tokens, padding included, if the transformer takes no other."""
        return None

    @classmethod
    def frame_rate(cls, transformer_config: Mapping[str, Any]) -> float:
        """Frames a second of the videos that such a transformer was trained with."""
        return float(cls.sampling.fps)

    @staticmethod
    def transformer(config: Mapping[str, Any]) -> nn.Module:
        """A transformer with random weights, on the device of `torch.device(...)` around the call."""
        ...

    @staticmethod
    def tiny_pipeline(seed: int = 0, **options: bool) -> Any:
        """A whole diffusers pipeline with a two-layer transformer and random weights, for clips of TINY_CLIP (tiny.py)."""
        ...

    def sample_timesteps(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Training timesteps (n,) float32 in [0, 1000], distributed as the family trains."""
        ...

    def timesteps_at(self, u: torch.Tensor, *, uniform: bool = False) -> torch.Tensor:
        """Quantiles u (n,) in [0, 1) of the timesteps the family trains with, or of equally likely ones, float32."""
        ...

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Noisy latents at `timestep` (n,), shaped like `clean` (n, ...)."""
        ...

    def predict(
        self,
        model: nn.Module,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        image: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The transformer's own prediction (velocity), shaped like `target`; `timestep` (n,), `text` (n, l, d), and `image`
        as `encode_image` gives it."""
        ...

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """What the transformer was trained to predict for `add_noise(clean, noise, timestep)`."""
        ...

    def foldable_inputs(self, model: nn.Module) -> list[FoldableInput]:
        """Inputs of the transformer's linear layers that can be shifted or scaled per channel for nothing."""
        ...

    def encode_text(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> torch.Tensor:
        """Text embeddings (n, max_sequence_length, d) as the pipeline feeds them to the transformer. Of a pipeline that masks
        padding, its rows are zeros: they are not stored, and `text_mask` finds them."""
        ...

    def encode_clips(self, pipeline: Any, clips: torch.Tensor) -> torch.Tensor:
        """Normalised latents of clips (n, 3, t, h, w) in [-1, 1], of an image model with t = 1; with `reads_image`, and behind
        them in the layout that the transformer takes, what it reads of the first frame."""
        ...

    def encode_image(self, pipeline: Any, clips: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, m, e) of the first frames of clips, for transformers that attend to them; m = 0 for all others."""
        return torch.empty(len(clips), 0, 0)

    def decode_latents(self, pipeline: Any, latents: torch.Tensor, frames: int) -> torch.Tensor:
        """Clips (n, 3, frames, h, w) in [-1, 1] of normalised latents, of `encode_clips` or sampled."""
        ...

    def arguments(self, text: torch.Tensor, negative: torch.Tensor | None, size: ClipSize) -> dict[str, Any]:
        """What the pipeline's call is told of embeddings (n, l, d), those that guidance leads away from, and the clips."""
        clip = {"height": size.height, "width": size.width, "num_frames": size.frames}
        return clip | prompts(text, negative) | {"max_sequence_length": size.max_sequence_length}

    def image_arguments(self, picture: torch.Tensor, size: ClipSize) -> dict[str, Any]:
        """With `reads_image`: what the pipeline's call is told of a first frame (3, h, w) uint8, as large as the clip."""
        return {"image": as_image(picture)}

    def unpacked(self, latents: torch.Tensor, size: ClipSize) -> torch.Tensor:
        """Latents as `encode_clips` gives them, of those that the pipeline denoises."""
        return latents


class FlowMatching(Family, Protocol):
    """Noise and targets of flow matching: a straight path from data to noise, its levels shifted by one number."""

    scheduler_options: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "num_train_timesteps": (NUM_TRAIN_TIMESTEPS,),
        "prediction_type": ("flow_prediction",),
        "use_flow_sigmas": (True,),
        "use_dynamic_shifting": (False,),
        "use_karras_sigmas": (False, None),
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
        "use_lu_lambdas": (False, None),
        "shift_terminal": (None,),
        "invert_sigmas": (False,),
        "sigma_min": (None,),
        "sigma_max": (None,),
    }
    shift: float

    def sample_timesteps(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Uniform noise levels, shifted as the sampler shifts its own."""
        return self.timesteps_at(torch.rand(n, generator=generator))

    def timesteps_at(self, u: torch.Tensor, *, uniform: bool = False) -> torch.Tensor:
        low, high = self.noise_range
        if not uniform:  # the quantiles of the two ends
            low, high = (x if x in (0, 1) else x / (self.shift - (self.shift - 1) * x) for x in (low, high))
        u = low + (high - low) * u
        return NUM_TRAIN_TIMESTEPS * (u if uniform else self.shift * u / (1 + (self.shift - 1) * u))

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        sigma = (timestep / NUM_TRAIN_TIMESTEPS).to(clean.dtype).view(-1, *[1] * (clean.ndim - 1))
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The velocity of the straight path from data to noise."""
        return noise - clean


class DiscreteNoise(Family, Protocol):
    """Noise of a diffusion process with 1,000 levels, all equally likely in training."""

    noising: Any  # a scheduler of diffusers with these levels

    def __init__(self, scheduler_config: Mapping[str, Any]) -> None: ...

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any], index: Mapping[str, Any] = _NOTHING) -> Self:
        """Raises ValueError for a scheduler of another kind of noise."""
        if config and "beta_schedule" not in config:
            raise ValueError(
                f"scheduler {config.get('_class_name')!r:.100} has no beta_schedule: it changes noise levels or the target in "
                f"a way that training and evaluation of {cls.name} do not follow"
            )
        return cls(config)

    def sample_timesteps(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Uniform over the 1,000 discrete levels."""
        return torch.randint(NUM_TRAIN_TIMESTEPS, (n,), generator=generator).float()

    def timesteps_at(self, u: torch.Tensor, *, uniform: bool = False) -> torch.Tensor:
        return torch.floor(NUM_TRAIN_TIMESTEPS * u)

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.noising.add_noise(clean, noise, timestep.long())


def prompts(text: torch.Tensor, negative: torch.Tensor | None, mask: bool = False) -> dict[str, torch.Tensor]:
    """Embeddings as arguments of a pipeline's call; with their masks for a pipeline that needs them."""
    given = {"prompt_embeds": text} | ({} if negative is None else {"negative_prompt_embeds": negative})
    masks = {name.replace("embeds", "attention_mask"): text_mask(value) for name, value in given.items()} if mask else {}
    return given | masks


def text_mask(text: torch.Tensor) -> torch.Tensor:
    """(n, l) bool: False for padding, the rows of zeros among embeddings (n, l, d)."""
    return text.ne(0).any(-1)
