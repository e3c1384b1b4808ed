"""FLUX.1 [dev] and [schnell] text-to-image: flow matching on latents (n, c, h, w), read as tokens of 2 x 2 (n, h w / 4, 4 c).

Text is T5's embeddings, not masked, and CLIP's pooled one. [dev] is told the guidance scale; [schnell] takes none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from qvgen.models.family import (
    ClipSize,
    ClipStep,
    ImageFamily,
    SamplingSettings,
    as_tokens,
    from_tokens,
    image_step,
    pooled_apart,
    prompts,
    with_pooled,
)
from qvgen.models.folding import FoldableInput, joint_block_inputs
from qvgen.models.noise import DYNAMIC_SHIFT, FlowMatching, ToldGuidance
from qvgen.models.tiny import POOLED_DIM, TEXT_DIM, clip_encoder, image_vae, seeded, t5_sizes, word_tokenizer

PATCH = 2  # rows and columns of latents in a token; the pipeline packs them, not the transformer

# transformer/config.json of FLUX.1 [dev] in diffusers format.
FLUX_1_DEV: Mapping[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
TINY: Mapping[str, Any] = {
    **FLUX_1_DEV,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_DIM,
    "pooled_projection_dim": POOLED_DIM,
    "axes_dims_rope": (4, 4, 8),
}


class FluxFamily(ImageFamily, ToldGuidance):
    name: ClassVar[str] = "flux"
    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    default_targets: ClassVar[tuple[str, ...]] = (r"re:(single_)?transformer_blocks\..*",)
    sampling: ClassVar[SamplingSettings] = SamplingSettings(1, 1024, 1024, 512, 28, 3.5, fps=1)
    guidance_can_stop: ClassVar[bool] = False
    scheduler_options: ClassVar[Mapping[str, tuple[Any, ...]]] = {**FlowMatching.scheduler_options, **DYNAMIC_SHIFT}
    published: ClassVar[tuple[str, Mapping[str, Any]]] = ("flux.1_dev", FLUX_1_DEV)
    needed: ClassVar[tuple[str, ...]] = ("text_encoder_2", "tokenizer_2")
    fraction_models: ClassVar[tuple[str, ...]] = ("FluxTransformer2DModel",)

    @staticmethod
    def refusal(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> str | None:
        read, made = (transformer_config.get(name) for name in ("in_channels", "out_channels"))
        if made is not None and made != (read or FLUX_1_DEV["in_channels"]):
            return f"the transformer reads an image beside the noise ({read!s:.100} input channels for {made!s:.100})"
        return None

    @staticmethod
    def clip_step(transformer_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> ClipStep:
        return image_step(vae_config, PATCH)

    @classmethod
    def sampling_of(cls, transformer_config: Mapping[str, Any]) -> SamplingSettings:
        """Of [schnell] four steps, fewer text tokens and no guidance."""
        if transformer_config.get("guidance_embeds"):
            return cls.sampling
        return replace(cls.sampling, max_sequence_length=256, inference_steps=4, guidance_scale=1.0)

    @staticmethod
    def transformer(config: Mapping[str, Any]) -> nn.Module:
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel(**config)

    @staticmethod
    def tiny_pipeline(seed: int = 0, schnell: bool = False) -> Any:
        """As [dev], or as [schnell]."""
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
        from transformers import T5Config, T5EncoderModel

        tokenizer: Any = word_tokenizer()
        shift: dict[str, Any] = {"shift": 1.0} if schnell else {"use_dynamic_shifting": True, "shift": 3.0}
        with seeded(seed):
            vae = image_vae(scaling_factor=0.3611, shift_factor=0.1159)
            clip, t5 = clip_encoder(tokenizer), T5EncoderModel(T5Config(**t5_sizes(tokenizer))).eval()
        return FluxPipeline(
            tokenizer=tokenizer,
            text_encoder=clip,
            tokenizer_2=word_tokenizer(),
            text_encoder_2=t5,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(**shift),  # the published models' settings
            transformer=tiny_transformer(seed, schnell),
        )

    def predict(self, model: Any, latents: Tensor, timestep: Tensor, text: Tensor, image: Tensor | None = None) -> Tensor:
        pooled, text = pooled_apart(model, text)
        packed = pixel_unshuffle(latents, PATCH)
        tokens = model(
            hidden_states=as_tokens(packed),
            timestep=timestep / 1000,
            guidance=torch.full_like(timestep, self.guidance_scale) if model.config.guidance_embeds else None,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=torch.zeros_like(text[0, :, :3]),
            img_ids=_positions(packed),
            return_dict=False,
        )[0]
        return pixel_shuffle(from_tokens(tokens, packed.shape[2:]), PATCH)

    def arguments(self, pipeline: Any, text: Tensor, negative: Tensor | None, size: ClipSize) -> dict[str, Any]:
        return super().arguments(pipeline, text, negative, size) | prompts(text, negative, model=pipeline.transformer)

    def unpacked(self, latents: Tensor, size: ClipSize) -> Tensor:
        rows = round((latents.shape[1] * size.height / size.width) ** 0.5)  # whatever the factor of the VAE
        return pixel_shuffle(from_tokens(latents, (rows, latents.shape[1] // rows)), PATCH)

    def foldable_inputs(self, model: nn.Module) -> list[FoldableInput]:
        return joint_block_inputs(model)

    def encode_text(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> Tensor:
        text, pooled, _ = pipeline.encode_prompt(
            list(prompts), max_sequence_length=max_sequence_length, device=pipeline.text_encoder.device
        )
        return with_pooled(pooled, text)


def tiny_transformer(seed: int = 0, schnell: bool = False) -> Any:
    """A block of each kind, 2 heads of 16, in evaluation mode. Latents (n, 4, h, w), text (n, 1 + l, 16)."""
    with seeded(seed):
        return FluxFamily.transformer({**TINY, "guidance_embeds": not schnell}).eval()


def _positions(packed: Tensor) -> Tensor:
    """(h w, 3) for the tokens of latents (n, c, h, w): 0, row, column."""
    rows, columns = (torch.arange(length, device=packed.device, dtype=packed.dtype) for length in packed.shape[2:])
    return torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns)
