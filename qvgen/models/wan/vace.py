"""Wan VACE, trained to continue a first frame: flow matching whose transformer reads a masked video in blocks of its own.

Latents (n, 3 c, t, h, w): the noisy ones, and as diffusers' WanVACEPipeline makes them of a video that is the first frame and
then grey, those of what stays of it and those of what is to be made. The transformer also reads the mask, the same one for all
clips.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from qvgen.models.family import ClipSize
from qvgen.models.pictures import as_clips, as_image, first_frames
from qvgen.models.tiny import LATENT_CHANNELS, seeded
from qvgen.models.wan.text import TINY, WAN_2_1_1_3B, WanFamily, experts_fault

MASK_CHANNELS = 64  # one for each of the pixels that a latent pixel stands for
_GREY = 128

# transformer/config.json of Wan 2.1 VACE 1.3B in diffusers format.
WAN_2_1_VACE_1_3B: Mapping[str, Any] = {**WAN_2_1_1_3B, "vace_layers": list(range(0, 30, 2)), "vace_in_channels": 96}
TINY_VACE: Mapping[str, Any] = {**TINY, "vace_layers": [0, 1], "vace_in_channels": 2 * LATENT_CHANNELS + MASK_CHANNELS}


class WanVACEFamily(WanFamily):
    name: ClassVar[str] = "wan_vace"
    pipelines: ClassVar[tuple[str, ...]] = ("WanVACEPipeline",)
    default_targets: ClassVar[tuple[str, ...]] = (*WanFamily.default_targets, r"re:vace_blocks\..*")
    published: ClassVar[tuple[str, Mapping[str, Any]]] = ("wan2.1_vace_1.3b", WAN_2_1_VACE_1_3B)
    task: ClassVar[str] = "image-to-video"
    reads_image: ClassVar[bool] = True

    @staticmethod
    def refusal(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> str | None:
        if fault := experts_fault(index):
            return fault
        if transformer_config.get("image_dim") is not None:
            return "the transformer attends to embeddings of an image (image_dim), which WanVACEPipeline does not make"
        wanted = 2 * transformer_config.get("in_channels", 16) + MASK_CHANNELS
        read = transformer_config.get("vace_in_channels", 96)
        if read != wanted:
            return f"its control has {read!r:.100} channels; those of a masked video are {wanted}"
        return None

    @staticmethod
    def transformer(config: Mapping[str, Any]) -> nn.Module:
        from diffusers import WanVACETransformer3DModel

        return WanVACETransformer3DModel(**config)

    @staticmethod
    def tiny_pipeline(seed: int = 0) -> Any:
        from diffusers import WanVACEPipeline

        return WanVACEPipeline(**WanFamily.tiny_pipeline(seed).components | {"transformer": tiny_transformer(seed)})

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """What the transformer reads of the masked video stays as it is."""
        own = clean.shape[1] // 3
        return torch.cat([super().add_noise(clean[:, :own], noise[:, :own], timestep), clean[:, own:]], dim=1)

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        own = clean.shape[1] // 3
        return super().target(clean[:, :own], noise[:, :own], timestep)

    def predict(
        self,
        model: nn.Module,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        image: torch.Tensor | None = None,
    ) -> torch.Tensor:
        own = latents.shape[1] // 3
        # The pipeline takes one video frame's mask for each latent frame, and never the first of several: 1 everywhere.
        mask = torch.full_like(latents[:, :1], latents.shape[2] > 1).expand(-1, MASK_CHANNELS, -1, -1, -1)
        return model(
            hidden_states=latents[:, :own],
            timestep=timestep,
            encoder_hidden_states=text,
            control_hidden_states=torch.cat([latents[:, own:], mask], dim=1),
            return_dict=False,
        )[0]

    def encode_clips(self, pipeline: Any, clips: torch.Tensor) -> torch.Tensor:
        """Pixels of the other part are 0 in both: behind the first frame what stays, in it what is to be made."""
        first = as_clips(first_frames(clips)).to(clips.device)
        behind = torch.zeros_like(first).expand(-1, -1, clips.shape[2] - 1, -1, -1)
        grey = as_clips(torch.full_like(first[:1, :, 0], _GREY)).expand_as(behind[:1])
        known, wanted = torch.cat([first, behind], dim=2), torch.cat([torch.zeros_like(first[:1]), grey], dim=2)
        latents, known, wanted = (super(WanVACEFamily, self).encode_clips(pipeline, x) for x in (clips, known, wanted))
        return torch.cat([latents, known, wanted.expand_as(known)], dim=1)

    def decode_latents(self, pipeline: Any, latents: torch.Tensor, frames: int) -> torch.Tensor:
        return super().decode_latents(pipeline, latents[:, : pipeline.vae.config.z_dim], frames)

    def image_arguments(self, picture: torch.Tensor, size: ClipSize) -> dict[str, Any]:
        """A video of the picture and then grey, and its mask, in black what is known."""
        from PIL import Image

        shape, behind = (size.width, size.height), size.frames - 1
        video = [as_image(picture), *[Image.new("RGB", shape, (_GREY,) * 3)] * behind]
        return {"video": video, "mask": [Image.new("L", shape, 0), *[Image.new("L", shape, 255)] * behind]}


def tiny_transformer(seed: int = 0) -> Any:
    """2 layers, each with a block for the control, 2 heads of 12, in evaluation mode. Latents (n, 12, t, h, w), text
    (n, l, 16)."""
    with seeded(seed):
        return WanVACEFamily.transformer(TINY_VACE).eval()
