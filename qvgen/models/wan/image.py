"""Wan 2.1 / 2.2 image-to-video: flow matching whose transformer also reads the first frame.

Three layouts, as diffusers' WanImageToVideoPipeline has them. Wan 2.1 and 2.2 A14B: latents (n, 2 c + 4, t, h, w), the noisy
ones, a mask that is 1 in the first latent frame, and the latents of a clip that is the first frame and then grey; Wan 2.1 has
embeddings of the frame by CLIP besides, which every block attends to. Wan 2.2 TI2V 5B: latents (n, c, t, h, w), whose first
frame stays clean and has timestep 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import nn

from qvgen.models.files import EXPERT
from qvgen.models.pictures import as_clips, as_image, first_frames
from qvgen.models.tiny import LATENT_CHANNELS, TINY_CLIP, seeded
from qvgen.models.wan.text import TINY, WAN_2_1_1_3B, WanFamily, experts_fault

MASK_CHANNELS = 4  # one for each of the video frames that a latent frame stands for
TEXT_TOKENS = 512  # that diffusers' transformer counts off from the end to find the image's, whatever the text's length is

# transformer/config.json of Wan 2.1 I2V 14B in diffusers format.
WAN_2_1_I2V_14B: Mapping[str, Any] = {
    **WAN_2_1_1_3B,
    "num_attention_heads": 40,
    "in_channels": 36,
    "ffn_dim": 13824,
    "num_layers": 40,
    "image_dim": 1280,
    "added_kv_proj_dim": 5120,
}
_CONDITIONED: Mapping[str, Any] = {**TINY, "in_channels": 2 * LATENT_CHANNELS + MASK_CHANNELS}
_TINY_CLIP_WIDTH = 8
TINY_I2V: Mapping[str, Any] = {**_CONDITIONED, "image_dim": _TINY_CLIP_WIDTH, "added_kv_proj_dim": 24}


class WanImageFamily(WanFamily):
    name: ClassVar[str] = "wan_image"
    pipelines: ClassVar[tuple[str, ...]] = ("WanImageToVideoPipeline",)
    published: ClassVar[tuple[str, Mapping[str, Any]]] = ("wan2.1_i2v_14b", WAN_2_1_I2V_14B)
    task: ClassVar[str] = "image-to-video"
    optional: ClassVar[tuple[str, ...]] = ("image_encoder", "image_processor", *WanFamily.optional)
    reads_image: ClassVar[bool] = True

    def __init__(
        self,
        shift: float = 1.0,
        boundary: float | None = None,
        component: str = "transformer",
        expand_timesteps: bool = False,
    ) -> None:
        """`expand_timesteps`: of TI2V 5B, a timestep for each token."""
        super().__init__(shift, boundary, component)
        self.expand_timesteps = expand_timesteps

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any], index: Mapping[str, Any] = MappingProxyType({})) -> Self:
        plain = WanFamily.from_scheduler(config)
        expert = index.get(EXPERT) or "transformer"
        return cls(plain.shift, index.get("boundary_ratio"), expert, bool(index.get("expand_timesteps")))

    @staticmethod
    def refusal(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> str | None:
        if fault := experts_fault(index):
            return fault
        if transformer_config.get("pos_embed_seq_len") is not None:
            return "the transformer reads a first and a last frame (FLF2V); only a first frame is encoded by the stages"
        encoder = index.get("image_encoder")
        if transformer_config.get("image_dim") is not None and not (isinstance(encoder, list) and encoder[1] is not None):
            return "the transformer attends to embeddings of the image (image_dim), and there is no image_encoder"
        given, made = (transformer_config.get(name, 16) for name in ("in_channels", "out_channels"))
        wanted = made if index.get("expand_timesteps") else 2 * made + MASK_CHANNELS
        if given != wanted:
            return f"the transformer has {given!r:.100} input channels for {made!r:.100}; a first frame takes {wanted!r:.100}"
        return None

    @staticmethod
    def tiny_pipeline(seed: int = 0, experts: bool = False, expand: bool = False) -> Any:
        """As Wan 2.1 I2V, or with one of the options as Wan 2.2: `experts`, A14B with two transformers; `expand`, TI2V 5B."""
        from diffusers import WanImageToVideoPipeline

        if experts and expand:
            raise ValueError("no pipeline of Wan has both experts and expand")
        kind = "experts" if experts else "expand" if expand else ""
        parts = WanFamily.tiny_pipeline(seed).components
        parts["transformer"] = tiny_transformer(seed, kind)
        if kind == "experts":
            parts |= {"transformer_2": tiny_transformer(seed + 1, kind), "boundary_ratio": 0.5}
        elif kind == "expand":
            parts["expand_timesteps"] = True
        else:
            parts |= _tiny_image_encoder(seed)
        return WanImageToVideoPipeline(**parts)

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """What the transformer reads of the first frame stays as it is."""
        if self.expand_timesteps:
            return torch.cat([clean[:, :, :1], super().add_noise(clean[:, :, 1:], noise[:, :, 1:], timestep)], dim=2)
        own = _own_channels(clean)
        return torch.cat([super().add_noise(clean[:, :own], noise[:, :own], timestep), clean[:, own:]], dim=1)

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The velocity; 0 in a latent frame that stays clean, as in `predict`."""
        if self.expand_timesteps:
            return _without_first(super().target(clean, noise, timestep))
        own = _own_channels(clean)
        return super().target(clean[:, :own], noise[:, :own], timestep)

    def predict(
        self,
        model: nn.Module,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        image: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.expand_timesteps:
            timestep = _per_token(model, latents, timestep)
        velocity = model(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=text,
            encoder_hidden_states_image=image if image is not None and image.shape[1] else None,
            return_dict=False,
        )[0]
        return _without_first(velocity) if self.expand_timesteps else velocity

    def encode_text(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> torch.Tensor:
        text = super().encode_text(pipeline, prompts, max_sequence_length)
        if pipeline.transformer.config.image_dim is None:
            return text
        return torch.nn.functional.pad(text, (0, 0, 0, TEXT_TOKENS - text.shape[1]))

    def encode_clips(self, pipeline: Any, clips: torch.Tensor) -> torch.Tensor:
        latents = super().encode_clips(pipeline, clips)
        first = super().encode_clips(pipeline, self._condition(clips))
        if self.expand_timesteps:
            return torch.cat([first, latents[:, :, 1:]], dim=2)
        mask = torch.zeros_like(latents[:, :1]).repeat(1, MASK_CHANNELS, 1, 1, 1)
        mask[:, :, 0] = 1
        return torch.cat([latents, mask, first], dim=1)

    def _condition(self, clips: torch.Tensor) -> torch.Tensor:
        """The clip whose latents the transformer reads: the first frame, by itself or followed by grey."""
        first = as_clips(first_frames(clips)).to(clips.device)
        if self.expand_timesteps:
            return first
        return torch.cat([first, torch.zeros_like(first).expand(-1, -1, clips.shape[2] - 1, -1, -1)], dim=2)

    def encode_image(self, pipeline: Any, clips: torch.Tensor) -> torch.Tensor:
        if getattr(pipeline, "image_encoder", None) is None:
            return super().encode_image(pipeline, clips)
        images = [as_image(picture) for picture in first_frames(clips)]
        return pipeline.encode_image(images, pipeline.image_encoder.device)

    def decode_latents(self, pipeline: Any, latents: torch.Tensor, frames: int) -> torch.Tensor:
        return super().decode_latents(pipeline, latents[:, : pipeline.vae.config.z_dim], frames)


def tiny_transformer(seed: int = 0, kind: str = "") -> Any:
    """2 layers, 2 heads of 12, in evaluation mode; `kind` as the options of `tiny_pipeline`. Latents (n, 12, t, h, w), with
    "expand" (n, 4, t, h, w); image (n, 5, 8) without a `kind`, else none; text (n, l, 16)."""
    config = {"": TINY_I2V, "experts": _CONDITIONED, "expand": TINY}[kind]
    with seeded(seed):
        return WanImageFamily.transformer(config).eval()


def _tiny_image_encoder(seed: int) -> dict[str, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    size = TINY_CLIP.height
    config = CLIPVisionConfig(
        hidden_size=_TINY_CLIP_WIDTH,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=size // 2,
    )
    with seeded(seed):
        encoder = CLIPVisionModel(config).eval()
    return {"image_encoder": encoder, "image_processor": CLIPImageProcessor(size=size, crop_size=size)}


def _own_channels(latents: torch.Tensor) -> int:
    """Channels of the video itself among those that the transformer reads."""
    return (latents.shape[1] - MASK_CHANNELS) // 2


def _without_first(velocity: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(velocity[:, :, :1]), velocity[:, :, 1:]], dim=2)


def _per_token(model: Any, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Timesteps (n, tokens): 0 in the first latent frame."""
    _, height, width = model.config.patch_size
    mask = torch.ones_like(latents[0, 0, :, ::height, ::width], dtype=timestep.dtype)
    mask[0] = 0
    return timestep[:, None] * mask.flatten()
