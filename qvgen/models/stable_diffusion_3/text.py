"""Stable Diffusion 3 and 3.5 text-to-image: flow matching on latents (n, c, h, w).

Text is a row of pooled embeddings of two CLIP encoders, then their embeddings of tokens side by side, then T5's; none of it is
masked. Image and text meet in one attention; 3.5 Medium has a second one, of the image alone, in its first blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from qvgen.models.family import (
    ClipSize,
    ClipStep,
    ImageFamily,
    SamplingSettings,
    image_step,
    pooled_apart,
    prompts,
    with_pooled,
)
from qvgen.models.folding import FoldableInput, joint_block_inputs
from qvgen.models.noise import FlowMatching
from qvgen.models.tiny import (
    LATENT_CHANNELS,
    POOLED_DIM,
    TEXT_DIM,
    TINY_CLIP,
    clip_encoder,
    image_vae,
    seeded,
    t5_sizes,
    word_tokenizer,
)

# transformer/config.json of Stable Diffusion 3.5 Medium in diffusers format.
STABLE_DIFFUSION_3_5_MEDIUM: Mapping[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
TINY: Mapping[str, Any] = {
    **STABLE_DIFFUSION_3_5_MEDIUM,
    "sample_size": TINY_CLIP.height // 8,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_DIM,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 2 * POOLED_DIM,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0,),
}


class StableDiffusion3Family(ImageFamily, FlowMatching):
    name: ClassVar[str] = "stable_diffusion_3"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    default_targets: ClassVar[tuple[str, ...]] = (r"re:transformer_blocks\..*",)
    sampling: ClassVar[SamplingSettings] = SamplingSettings(1, 1024, 1024, 256, 28, 7.0, fps=1)
    guidance_can_stop: ClassVar[bool] = False
    published: ClassVar[tuple[str, Mapping[str, Any]]] = ("stable_diffusion_3.5_medium", STABLE_DIFFUSION_3_5_MEDIUM)
    needed: ClassVar[tuple[str, ...]] = ("text_encoder_2", "text_encoder_3", "tokenizer_2", "tokenizer_3")

    @staticmethod
    def refusal(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> str | None:
        read, made = (transformer_config.get(name, 16) for name in ("in_channels", "out_channels"))
        if read != made:
            return f"the transformer reads an image beside the noise ({read!s:.100} input channels for {made!s:.100})"
        return None

    @staticmethod
    def clip_step(transformer_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> ClipStep:
        step = image_step(vae_config, transformer_config.get("patch_size", 2))
        return replace(step, most=step.height * transformer_config.get("pos_embed_max_size", 96))

    @classmethod
    def sampling_of(cls, transformer_config: Mapping[str, Any]) -> SamplingSettings:
        """Of 3.5 Medium and Large what their model cards say."""
        if transformer_config.get("dual_attention_layers"):
            return replace(cls.sampling, inference_steps=40, guidance_scale=4.5)
        return replace(cls.sampling, guidance_scale=3.5) if transformer_config.get("qk_norm") else cls.sampling

    @staticmethod
    def transformer(config: Mapping[str, Any]) -> nn.Module:
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel(**config)

    @staticmethod
    def tiny_pipeline(seed: int = 0) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
        from transformers import T5Config, T5EncoderModel

        tokenizer: Any = word_tokenizer()
        with seeded(seed):
            vae = image_vae(scaling_factor=1.5305, shift_factor=0.0609)
            clips = [clip_encoder(tokenizer, projected=True) for _ in range(2)]
            t5 = T5EncoderModel(T5Config(**t5_sizes(tokenizer))).eval()
        return StableDiffusion3Pipeline(
            tokenizer=tokenizer,
            text_encoder=clips[0],
            tokenizer_2=word_tokenizer(),
            text_encoder_2=clips[1],
            tokenizer_3=word_tokenizer(),
            text_encoder_3=t5,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=tiny_transformer(seed),
        )

    def predict(
        self,
        model: nn.Module,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        image: torch.Tensor | None = None,
    ) -> torch.Tensor:
        pooled, text = pooled_apart(model, text)
        return model(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    def arguments(self, pipeline: Any, text: torch.Tensor, negative: torch.Tensor | None, size: ClipSize) -> dict[str, Any]:
        return super().arguments(pipeline, text, negative, size) | prompts(text, negative, model=pipeline.transformer)

    def foldable_inputs(self, model: nn.Module) -> list[FoldableInput]:
        return joint_block_inputs(model)

    def encode_text(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> torch.Tensor:
        """(n, 1 + c + max_sequence_length, d), c as many tokens as CLIP's encoders read."""
        text, _, pooled, _ = pipeline.encode_prompt(
            list(prompts),
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
            device=pipeline.text_encoder.device,
        )
        return with_pooled(pooled, text)


def tiny_transformer(seed: int = 0) -> Any:
    """2 layers, 2 heads of 16, in evaluation mode. Latents (n, 4, h, w), text (n, 1 + l, 16)."""
    with seeded(seed):
        return StableDiffusion3Family.transformer(TINY).eval()
