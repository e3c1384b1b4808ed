"""The protocol of a family of diffusion transformers: every question that the library asks about one.

A family is one file (wan/text.py, wan/image.py, cogvideox/text.py, ...): everything that is true of it and of no other stands
there, and in noise.py what several share. registry.py knows the families by the diffusers pipelines they belong to;
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
    `width` pixels, neither above `most` pixels."""

    frames: int | None
    height: int
    width: int
    most: int | None = None


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
    needed: ClassVar[tuple[str, ...]] = ()  # components that its pipelines have besides those of source.py
    optional: ClassVar[tuple[str, ...]] = ()  # and those that they may have
    reads_image: ClassVar[bool] = False  # whether its pipelines are also given the first frame
    guidance_argument: ClassVar[str] = "guidance_scale"  # what the pipeline's call names the scale
    guidance_is_told: ClassVar[bool] = False  # whether the transformer reads the guidance scale: no prompt is led away from
    fraction_models: ClassVar[tuple[str, ...]] = ()  # classes of its transformers that are called with t / 1000

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
    def sampling_of(cls, transformer_config: Mapping[str, Any]) -> SamplingSettings:
        """`sampling`, or what differs for such a transformer, as the frame rate that it was trained with."""
        return cls.sampling

    @staticmethod
    def transformer(config: Mapping[str, Any]) -> nn.Module:
        """A transformer with random weights, on the device of `torch.device(...)` around the call."""
        ...

    @staticmethod
    def tiny_pipeline(seed: int = 0, *_: Any, **options: Any) -> Any:
        """A whole diffusers pipeline with a two-layer transformer and random weights, for clips of TINY_CLIP (tiny.py).
        `options`: true or false, the family's own."""
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
        padding, its rows are zeros: they are not stored, and `text_mask` finds them. Pooled embeddings are one row more, the
        first (`with_pooled`)."""
        text, _ = pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
            device=pipeline.text_encoder.device,
        )
        return text

    def encode_negative(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> torch.Tensor:
        """The same for prompts that guidance leads away from, which some pipelines encode otherwise."""
        return self.encode_text(pipeline, prompts, max_sequence_length)

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

    def arguments(self, pipeline: Any, text: torch.Tensor, negative: torch.Tensor | None, size: ClipSize) -> dict[str, Any]:
        """What the pipeline's call is told of embeddings (n, l, d), those that guidance leads away from, and the clips."""
        clip = {"height": size.height, "width": size.width, "num_frames": size.frames}
        return clip | prompts(text, negative) | {"max_sequence_length": size.max_sequence_length}

    def image_arguments(self, picture: torch.Tensor, size: ClipSize) -> dict[str, Any]:
        """With `reads_image`: what the pipeline's call is told of a first frame (3, h, w) uint8, as large as the clip."""
        return {"image": as_image(picture)}

    def unpacked(self, latents: torch.Tensor, size: ClipSize) -> torch.Tensor:
        """Latents as `encode_clips` gives them, of those that the pipeline denoises."""
        return latents


class ImageFamily(Family, Protocol):
    """Images, as clips of one frame, by a VAE of images (AutoencoderKL, AutoencoderDC): latents (n, c, h, w)."""

    task: ClassVar[str] = IMAGES

    def arguments(self, pipeline: Any, text: torch.Tensor, negative: torch.Tensor | None, size: ClipSize) -> dict[str, Any]:
        given = super().arguments(pipeline, text, negative, size)
        return {name: value for name, value in given.items() if name != "num_frames"}

    def encode_clips(self, pipeline: Any, clips: torch.Tensor) -> torch.Tensor:
        vae = pipeline.vae
        encoded = vae.encode(clips[:, :, 0].to(vae.device, vae.dtype))
        latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mean
        return (latents - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor

    def decode_latents(self, pipeline: Any, latents: torch.Tensor, frames: int) -> torch.Tensor:
        vae = pipeline.vae
        latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)
        return vae.decode(latents).sample.float().clamp(-1, 1).unsqueeze(2)


def prompts(
    text: torch.Tensor, negative: torch.Tensor | None, mask: bool = False, model: Any = None
) -> dict[str, torch.Tensor]:
    """Embeddings as arguments of a pipeline's call; with their masks for a pipeline that needs them, and the pooled ones apart
    for a `model` that reads them (`with_pooled`)."""
    found = {}
    for sign, value in (("", text), ("negative_", negative)):
        if value is None:
            continue
        if model is not None:
            found[f"{sign}pooled_prompt_embeds"], value = pooled_apart(model, value)
        found[f"{sign}prompt_embeds"] = value
        if mask:
            found[f"{sign}prompt_attention_mask"] = text_mask(value)
    return found


def with_pooled(pooled: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Embeddings (n, 1 + l, d) of pooled ones (n, p), p at most d, and those of tokens (n, l, d): both are stored alike."""
    row = torch.nn.functional.pad(pooled, (0, text.shape[-1] - pooled.shape[-1]))
    return torch.cat([row[:, None].to(text), text], dim=1)


def pooled_apart(model: Any, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of `with_pooled`, for a transformer whose config has the width of pooled embeddings."""
    return text[:, 0, : model.config.pooled_projection_dim], text[:, 1:]


def encode_masked(pipeline: Any, prompts: Sequence[str], max_sequence_length: int, **options: Any) -> torch.Tensor:
    """Embeddings (n, max_sequence_length, d) with zeros for padding, of a pipeline that gives them with their mask."""
    text, mask, _, _ = pipeline.encode_prompt(
        list(prompts),
        do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
        device=pipeline.text_encoder.device,
        **options,
    )
    return text * mask[..., None]


def text_mask(text: torch.Tensor) -> torch.Tensor:
    """(n, l) bool: False for padding, the rows of zeros among embeddings (n, l, d)."""
    return text.ne(0).any(-1)


def as_tokens(latents: torch.Tensor) -> torch.Tensor:
    """Latents (n, c, ...) as tokens (n, l, c)."""
    return latents.flatten(2).transpose(1, 2)


def from_tokens(tokens: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Inverse of `as_tokens` for latents (n, c, *shape)."""
    return tokens.transpose(1, 2).unflatten(2, shape)


def image_step(vae_config: Mapping[str, Any], patch: int) -> ClipStep:
    """`clip_step` of a VAE of images (AutoencoderKL) and a transformer that joins `patch` rows and columns of latents."""
    pixels = 2 ** (len(vae_config.get("block_out_channels", (64,))) - 1) * patch
    return ClipStep(None, pixels, pixels)
