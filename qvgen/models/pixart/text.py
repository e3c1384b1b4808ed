"""PixArt-Sigma text-to-image: discrete diffusion that predicts the noise in latents (n, c, h, w) of clips of one frame.

Attention to text is masked where a prompt is padded. The transformer also predicts variances, which its sampler does not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from qvgen.models.family import (
    ClipSize,
    ClipStep,
    ImageFamily,
    SamplingSettings,
    encode_masked,
    image_step,
    prompts,
    text_mask,
)
from qvgen.models.folding import FoldableInput, ada_norm_single_inputs
from qvgen.models.noise import DiscreteNoise
from qvgen.models.tiny import LATENT_CHANNELS, TEXT_DIM, TINY_CLIP, image_vae, seeded, t5_sizes, word_tokenizer
from qvgen.quant.primitives import NUM_TRAIN_TIMESTEPS

# transformer/config.json of PixArt-Sigma XL-2 1024 in diffusers format.
PIXART_SIGMA_XL_2: Mapping[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "sample_size": 128,
    "patch_size": 2,
    "interpolation_scale": 2,
    "use_additional_conditions": False,
    "caption_channels": 4096,
}
TINY: Mapping[str, Any] = {
    **PIXART_SIGMA_XL_2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": LATENT_CHANNELS,
    "out_channels": 2 * LATENT_CHANNELS,
    "num_layers": 2,
    "cross_attention_dim": 32,
    "sample_size": TINY_CLIP.height // 8,
    "interpolation_scale": 1,
    "caption_channels": TEXT_DIM,
}

# Arguments of a call for which the pipeline does not change a size to one that it knows.
EXACT_SIZE: dict[str, Any] = {"use_resolution_binning": False, "clean_caption": False, "negative_prompt": None}


class PixArtFamily(ImageFamily, DiscreteNoise):
    name: ClassVar[str] = "pixart"
    pipelines: ClassVar[tuple[str, ...]] = ("PixArtSigmaPipeline",)
    default_targets: ClassVar[tuple[str, ...]] = (r"re:transformer_blocks\..*",)
    sampling: ClassVar[SamplingSettings] = SamplingSettings(1, 1024, 1024, 300, 20, 4.5, fps=1)
    guidance_can_stop: ClassVar[bool] = False
    scheduler_options: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "num_train_timesteps": (NUM_TRAIN_TIMESTEPS,),
        "prediction_type": ("epsilon",),
        "use_flow_sigmas": (False, None),
    }
    published: ClassVar[tuple[str, Mapping[str, Any]]] = ("pixart_sigma_xl_2", PIXART_SIGMA_XL_2)

    def __init__(self, scheduler_config: Mapping[str, Any]) -> None:
        from diffusers import DDPMScheduler

        self.noising: Any = DDPMScheduler.from_config(dict(scheduler_config))

    @staticmethod
    def refusal(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> str | None:
        wanted = transformer_config.get("use_additional_conditions")
        if wanted or (wanted is None and transformer_config.get("sample_size", 128) == 128):
            return "the transformer is told the size of the image (use_additional_conditions), as PixArt-alpha's is"
        return None

    @staticmethod
    def clip_step(transformer_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> ClipStep:
        return image_step(vae_config, transformer_config.get("patch_size", 2))

    @staticmethod
    def transformer(config: Mapping[str, Any]) -> nn.Module:
        from diffusers import PixArtTransformer2DModel

        return PixArtTransformer2DModel(**config)

    @staticmethod
    def tiny_pipeline(seed: int = 0) -> Any:
        from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline
        from transformers import T5Config, T5EncoderModel

        tokenizer: Any = word_tokenizer()
        scheduler: Any = DPMSolverMultistepScheduler()  # with the published models' settings
        with seeded(seed):
            vae = image_vae(scaling_factor=0.13025)
            text_encoder = T5EncoderModel(T5Config(**t5_sizes(tokenizer))).eval()
        return PixArtSigmaPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            scheduler=scheduler,
            transformer=tiny_transformer(seed),
        )

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return noise

    def predict(
        self,
        model: nn.Module,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        image: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The noise, without the variances."""
        predicted = model(
            latents,
            encoder_hidden_states=text,
            encoder_attention_mask=text_mask(text),
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return predicted[:, : latents.shape[1]]

    def arguments(self, pipeline: Any, text: torch.Tensor, negative: torch.Tensor | None, size: ClipSize) -> dict[str, Any]:
        return super().arguments(pipeline, text, negative, size) | prompts(text, negative, mask=True) | EXACT_SIZE

    def foldable_inputs(self, model: nn.Module) -> list[FoldableInput]:
        parts: Any = model
        return ada_norm_single_inputs(model, parts.adaln_single.linear)

    def encode_text(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> torch.Tensor:
        """Lower case, and no more cleaned: how the pipeline cleans depends on what else is installed."""
        return encode_masked(pipeline, prompts, max_sequence_length)


def tiny_transformer(seed: int = 0) -> Any:
    """2 layers, 2 heads of 16, in evaluation mode. Latents (n, 4, h, w), text (n, l, 16)."""
    with seeded(seed):
        return PixArtFamily.transformer(TINY).eval()
