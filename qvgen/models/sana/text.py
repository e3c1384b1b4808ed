"""Sana text-to-image: flow matching on latents (n, c, h, w), with linear attention among image tokens.

Attention to text is masked where a prompt is padded. Its feed-forward (GLUMBConv) is made of convolutions, which stay as they
are: the layers that are quantized are the projections of both attentions, about half of a block's parameters.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import nn

from qvgen.models.family import ClipSize, ClipStep, ImageFamily, SamplingSettings, encode_masked, prompts, text_mask
from qvgen.models.folding import FoldableInput
from qvgen.models.noise import FlowMatching
from qvgen.models.pixart.text import EXACT_SIZE
from qvgen.models.tiny import LATENT_CHANNELS, TEXT_DIM, seeded, word_tokenizer

LEAST_PIXELS = 32  # the pipeline takes multiples of it, whatever the VAE

# transformer/config.json of Sana 1.6B 1024 in diffusers format.
SANA_1600M: Mapping[str, Any] = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "attention_bias": False,
    "sample_size": 32,
    "patch_size": 1,
}
TINY: Mapping[str, Any] = {
    **SANA_1600M,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": TEXT_DIM,
    "sample_size": 4,
}


class SanaFamily(ImageFamily, FlowMatching):
    name: ClassVar[str] = "sana"
    pipelines: ClassVar[tuple[str, ...]] = ("SanaPipeline",)
    default_targets: ClassVar[tuple[str, ...]] = (r"re:transformer_blocks\..*",)
    sampling: ClassVar[SamplingSettings] = SamplingSettings(1, 1024, 1024, 300, 20, 4.5, fps=1)
    guidance_can_stop: ClassVar[bool] = False
    published: ClassVar[tuple[str, Mapping[str, Any]]] = ("sana_1600m", SANA_1600M)

    @staticmethod
    def refusal(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> str | None:
        if transformer_config.get("guidance_embeds") or transformer_config.get("timestep_scale", 1) != 1:
            return "the transformer is distilled to a few steps and reads the guidance's scale, as Sana Sprint's does"
        return None

    @staticmethod
    def clip_step(transformer_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> ClipStep:
        halvings = len(vae_config.get("encoder_block_out_channels", (0,) * 6)) - 1
        pixels = math.lcm(2**halvings * transformer_config.get("patch_size", 1), LEAST_PIXELS)
        return ClipStep(None, pixels, pixels)

    @staticmethod
    def transformer(config: Mapping[str, Any]) -> nn.Module:
        from diffusers import SanaTransformer2DModel

        return SanaTransformer2DModel(**config)

    @staticmethod
    def tiny_pipeline(seed: int = 0) -> Any:
        from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline
        from transformers import Gemma2Config, Gemma2Model

        tokenizer: Any = word_tokenizer()
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)  # the published shift
        sizes: dict[str, Any] = {"block_out_channels": (8,) * 4, "layers_per_block": (1,) * 4, "qkv_multiscales": ((),) * 4}
        sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in sizes.items()}
        gemma: dict[str, Any] = {"hidden_size": TEXT_DIM, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
        gemma |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
        with seeded(seed):
            vae = AutoencoderDC(latent_channels=LATENT_CHANNELS, attention_head_dim=8, scaling_factor=0.41407, **sizes)
            text_encoder = Gemma2Model(Gemma2Config(**gemma)).eval()
        return SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae.eval(),
            scheduler=scheduler,
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
        return model(
            latents,
            encoder_hidden_states=text,
            encoder_attention_mask=text_mask(text),
            timestep=timestep,
            return_dict=False,
        )[0]

    def arguments(self, pipeline: Any, text: torch.Tensor, negative: torch.Tensor | None, size: ClipSize) -> dict[str, Any]:
        return super().arguments(pipeline, text, negative, size) | prompts(text, negative, mask=True) | EXACT_SIZE

    def foldable_inputs(self, model: nn.Module) -> list[FoldableInput]:
        return []

    def encode_text(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> torch.Tensor:
        """After the pipeline's instruction, whose tokens are left out again; the empty prompt, from which guidance leads away,
        without it."""
        instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
        parts = [
            encode_masked(pipeline, [*some], max_sequence_length, complex_human_instruction=instruction if given else None)
            for given, some in groupby(prompts, bool)
        ]
        return torch.cat(parts)

    def encode_negative(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> torch.Tensor:
        """Without the instruction."""
        return encode_masked(pipeline, prompts, max_sequence_length)


def tiny_transformer(seed: int = 0) -> Any:
    """2 layers, 2 heads of 16, in evaluation mode. Latents (n, 4, h, w), text (n, l, 16)."""
    with seeded(seed):
        return SanaFamily.transformer(TINY).eval()
