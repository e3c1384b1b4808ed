"""HunyuanVideo text-to-video: flow matching on latents (n, c, t, h, w), by a transformer that is told the guidance scale.

Text is a language model's embeddings of the prompt in a template, masked where it is padded, and CLIP's pooled one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from qvgen.models.family import ClipSize, ClipStep, SamplingSettings, pooled_apart, prompts, text_mask, with_pooled
from qvgen.models.folding import FoldableInput, joint_block_inputs
from qvgen.models.noise import ToldGuidance
from qvgen.models.tiny import LATENT_CHANNELS, POOLED_DIM, TEXT_DIM, clip_encoder, seeded, word_tokenizer

# transformer/config.json of HunyuanVideo (13B) in diffusers format.
HUNYUAN_VIDEO: Mapping[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": 2,
    "mlp_ratio": 4.0,
    "patch_size": 2,
    "patch_size_t": 1,
    "qk_norm": "rms_norm",
    "guidance_embeds": True,
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
    "rope_theta": 256.0,
    "rope_axes_dim": (16, 56, 56),
}
TINY: Mapping[str, Any] = {
    **HUNYUAN_VIDEO,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": TEXT_DIM,
    "pooled_projection_dim": POOLED_DIM,
    "rope_axes_dim": (4, 4, 4),
}
_CLIP_TOKENS = 77  # that the pipeline pads to


class HunyuanVideoFamily(ToldGuidance):
    name: ClassVar[str] = "hunyuan_video"
    pipelines: ClassVar[tuple[str, ...]] = ("HunyuanVideoPipeline",)
    default_targets: ClassVar[tuple[str, ...]] = (r"re:(single_)?transformer_blocks\..*",)
    sampling: ClassVar[SamplingSettings] = SamplingSettings(129, 720, 1280, 256, 50, 6.0, fps=24)
    guidance_can_stop: ClassVar[bool] = False
    published: ClassVar[tuple[str, Mapping[str, Any]]] = ("hunyuan_video", HUNYUAN_VIDEO)
    needed: ClassVar[tuple[str, ...]] = ("text_encoder_2", "tokenizer_2")

    @staticmethod
    def refusal(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> str | None:
        if (kind := transformer_config.get("image_condition_type")) is not None:
            return f"the transformer is conditioned on an image (image_condition_type = {kind!r:.100})"
        return None

    @staticmethod
    def clip_step(transformer_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> ClipStep:
        frames = vae_config.get("temporal_compression_ratio", 4) * transformer_config.get("patch_size_t", 1)
        pixels = vae_config.get("spatial_compression_ratio", 8) * transformer_config.get("patch_size", 2)
        return ClipStep(frames, pixels, pixels)

    @staticmethod
    def transformer(config: Mapping[str, Any]) -> nn.Module:
        from diffusers import HunyuanVideoTransformer3DModel

        return HunyuanVideoTransformer3DModel(**config)

    @staticmethod
    def tiny_pipeline(seed: int = 0) -> Any:
        from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline
        from transformers import LlamaConfig, LlamaModel

        tokenizer, tokenizer_2 = _template_tokenizer(), word_tokenizer()
        sizes: dict[str, Any] = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 2}
        llama: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
        llama |= {"vocab_size": len(tokenizer), "hidden_size": TEXT_DIM, "intermediate_size": 16}
        with seeded(seed):
            vae = AutoencoderKLHunyuanVideo(latent_channels=LATENT_CHANNELS, **sizes).eval()
            text_encoder = LlamaModel(LlamaConfig(**llama, bos_token_id=None, eos_token_id=None)).eval()
            text_encoder_2 = clip_encoder(tokenizer_2, _CLIP_TOKENS)
        return HunyuanVideoPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),  # the published model's settings
            transformer=tiny_transformer(seed),
        )

    def predict(self, model: Any, latents: Tensor, timestep: Tensor, text: Tensor, image: Tensor | None = None) -> Tensor:
        pooled, text = pooled_apart(model, text)
        return model(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=text,
            encoder_attention_mask=text_mask(text),
            pooled_projections=pooled,
            guidance=latents.new_full((len(latents),), self.guidance_scale) * 1000,
            return_dict=False,
        )[0]

    def arguments(self, pipeline: Any, text: Tensor, negative: Tensor | None, size: ClipSize) -> dict[str, Any]:
        with_mask = prompts(text, negative, mask=True, model=pipeline.transformer)
        return super().arguments(pipeline, text, negative, size) | with_mask

    def foldable_inputs(self, model: nn.Module) -> list[FoldableInput]:
        return joint_block_inputs(model)

    def encode_text(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> Tensor:
        text, pooled, mask = pipeline.encode_prompt(
            list(prompts), max_sequence_length=max_sequence_length, device=pipeline.text_encoder.device
        )
        return with_pooled(pooled, text * mask[..., None])

    def encode_clips(self, pipeline: Any, clips: Tensor) -> Tensor:
        vae = pipeline.vae
        return vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mean * vae.config.scaling_factor

    def decode_latents(self, pipeline: Any, latents: Tensor, frames: int) -> Tensor:
        vae = pipeline.vae
        return vae.decode(latents.to(vae.device, vae.dtype) / vae.config.scaling_factor).sample.float().clamp(-1, 1)


def tiny_transformer(seed: int = 0) -> Any:
    """A block of each kind, 2 heads of 12, in evaluation mode. Latents (n, 4, t, h, w), text (n, 1 + l, 16)."""
    with seeded(seed):
        return HunyuanVideoFamily.transformer(TINY).eval()


def _template_tokenizer() -> Any:
    """One that needs 95 tokens for the pipeline's template, as many as it cuts off, and puts none behind the prompt."""
    from tokenizers import processors

    tokenizer: Any = word_tokenizer()
    tokenizer.add_tokens(["<|eot_id|>", "Describe the video", "The main content"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    return tokenizer
