"""Qwen-Image text-to-image: flow matching on latents (n, c, h, w), of which the transformer reads 2 x 2 as a token.

Image and text are two streams with layers of their own, which meet in one attention, masked where a prompt is padded. The text
encoder reads a prompt inside a template, whose first tokens are left out of the embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from qvgen.models.family import ClipSize, ClipStep, ImageFamily, SamplingSettings, as_tokens, from_tokens, text_mask
from qvgen.models.folding import FoldableInput, joint_block_inputs
from qvgen.models.noise import DYNAMIC_SHIFT, FlowMatching
from qvgen.models.tiny import LATENT_CHANNELS, TEXT_DIM, seeded, word_tokenizer
from qvgen.models.wan.text import latent_statistics
from qvgen.quant.primitives import NUM_TRAIN_TIMESTEPS

PATCH = 2  # rows and columns of latents that a token stands for
PIXELS = 8  # rows and columns of a clip that a latent pixel stands for

# transformer/config.json of Qwen-Image in diffusers format.
QWEN_IMAGE: Mapping[str, Any] = {
    "patch_size": PATCH,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}
TINY: Mapping[str, Any] = {
    **QWEN_IMAGE,
    "in_channels": PATCH**2 * LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_DIM,
    "axes_dims_rope": (4, 4, 8),
}


class QwenImageFamily(ImageFamily, FlowMatching):
    name: ClassVar[str] = "qwen_image"
    pipelines: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)
    default_targets: ClassVar[tuple[str, ...]] = (r"re:transformer_blocks\..*",)
    sampling: ClassVar[SamplingSettings] = SamplingSettings(1, 1328, 1328, 512, 50, 4.0, fps=1)
    guidance_can_stop: ClassVar[bool] = False
    guidance_argument: ClassVar[str] = "true_cfg_scale"
    # The sampler shifts by the number of tokens and ends its steps at `shift_terminal`: other levels of the same path.
    scheduler_options: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **{name: values for name, values in FlowMatching.scheduler_options.items() if name != "shift_terminal"},
        **DYNAMIC_SHIFT,
    }
    published: ClassVar[tuple[str, Mapping[str, Any]]] = ("qwen_image", QWEN_IMAGE)
    fraction_models: ClassVar[tuple[str, ...]] = ("QwenImageTransformer2DModel",)

    @staticmethod
    def refusal(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> str | None:
        options = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
        if found := [name for name in options if transformer_config.get(name)]:
            return f"the transformer reads more than an image's latents, a timestep and text ({', '.join(found)})"
        return None

    @staticmethod
    def clip_step(transformer_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> ClipStep:
        """Raises ValueError for another VAE."""
        pixels = 2 ** len(vae_config.get("temperal_downsample", (False, True, True)))
        if pixels != PIXELS:
            raise ValueError(f"its VAE joins {pixels} pixels, that of Qwen-Image {PIXELS}")
        return ClipStep(None, PIXELS * PATCH, PIXELS * PATCH)

    @staticmethod
    def transformer(config: Mapping[str, Any]) -> nn.Module:
        from diffusers import QwenImageTransformer2DModel

        return QwenImageTransformer2DModel(**config)

    @staticmethod
    def tiny_pipeline(seed: int = 0) -> Any:
        from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        tokenizer: Any = word_tokenizer()
        heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
        text = heads | {"hidden_size": TEXT_DIM, "intermediate_size": 32, "rope_parameters": rope}
        words = len(tokenizer)
        text |= {"vocab_size": words, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
        pictures = {f"{name}_token_id": words + i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))}
        vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": TEXT_DIM}
        with seeded(seed):
            vae = AutoencoderKLQwenImage(
                base_dim=4,
                z_dim=LATENT_CHANNELS,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                latents_mean=[0.1] * LATENT_CHANNELS,
                latents_std=[2.0] * LATENT_CHANNELS,
            )
            config = Qwen2_5_VLConfig.from_dict({"text_config": text, "vision_config": vision, **pictures})
            text_encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
        return QwenImagePipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae.eval(),
            # The published model's settings, but for shift_terminal = 0.02, with which a single step has no schedule.
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=0.9,
                base_image_seq_len=256,
                max_image_seq_len=8192,
            ),
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
        patches = pixel_unshuffle(latents, PATCH)
        height, width = patches.shape[2:]
        tokens = model(
            hidden_states=as_tokens(patches),
            timestep=timestep / NUM_TRAIN_TIMESTEPS,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=text_mask(text),
            img_shapes=[[(1, height, width)]] * len(latents),
            return_dict=False,
        )[0]
        return pixel_shuffle(from_tokens(tokens, (height, width)), PATCH)

    def arguments(self, pipeline: Any, text: torch.Tensor, negative: torch.Tensor | None, size: ClipSize) -> dict[str, Any]:
        given = super().arguments(pipeline, text, negative, size)
        return given | {f"{name}_mask": text_mask(given[name]) for name in given if name.endswith("embeds")}

    def unpacked(self, latents: torch.Tensor, size: ClipSize) -> torch.Tensor:
        shape = [side // (PIXELS * PATCH) for side in (size.height, size.width)]
        return pixel_shuffle(from_tokens(latents, shape), PATCH)

    def foldable_inputs(self, model: nn.Module) -> list[FoldableInput]:
        return joint_block_inputs(model, (("img_mod.1", "img_mlp"), ("txt_mod.1", "txt_mlp")))

    def encode_text(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> torch.Tensor:
        """A prompt's own padding is left out in the pipeline: what is shorter is filled up with zeros here."""
        device = pipeline.text_encoder.device
        text, _ = pipeline.encode_prompt(list(prompts), max_sequence_length=max_sequence_length, device=device)
        return pad(text, (0, 0, 0, max_sequence_length - text.shape[1]))

    def encode_clips(self, pipeline: Any, clips: torch.Tensor) -> torch.Tensor:
        mean, std = latent_statistics(pipeline.vae)
        clips = clips.to(pipeline.vae.device, pipeline.vae.dtype)
        return ((pipeline.vae.encode(clips).latent_dist.mean - mean) / std).squeeze(2)

    def decode_latents(self, pipeline: Any, latents: torch.Tensor, frames: int) -> torch.Tensor:
        mean, std = latent_statistics(pipeline.vae)
        latents = latents.to(pipeline.vae.device).float().unsqueeze(2) * std + mean
        return pipeline.vae.decode(latents.to(pipeline.vae.dtype)).sample.float()


def tiny_transformer(seed: int = 0) -> Any:
    """2 layers, 2 heads of 16, in evaluation mode. Latents (n, 4, h, w), text (n, l, 16)."""
    with seeded(seed):
        return QwenImageFamily.transformer(TINY).eval()
