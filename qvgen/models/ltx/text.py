"""LTX-Video text-to-video: flow matching on latents (n, c, t, h, w), which the transformer reads as tokens (n, t h w, c).

Attention to text is masked where a prompt is padded. Positions are in seconds and pixels, so a clip has a frame rate: that of
`LTXFamily.sampling`, as the pipeline has it by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from qvgen.models.family import ClipSize, ClipStep, SamplingSettings, as_tokens, encode_masked, from_tokens, prompts, text_mask
from qvgen.models.folding import FoldableInput, ada_norm_single_inputs
from qvgen.models.noise import DYNAMIC_SHIFT, FlowMatching
from qvgen.models.tiny import LATENT_CHANNELS, TEXT_DIM, seeded, t5_sizes, word_tokenizer

FRAMES, PIXELS = 8, 32  # of a clip that a latent frame and a latent pixel stand for, in the VAE of every release

# transformer/config.json of LTX-Video 2B (0.9 to 0.9.5) in diffusers format.
LTX_VIDEO_2B: Mapping[str, Any] = {
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "patch_size_t": 1,
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "cross_attention_dim": 2048,
    "num_layers": 28,
    "caption_channels": 4096,
}
TINY: Mapping[str, Any] = {
    **LTX_VIDEO_2B,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": TEXT_DIM,
}


class LTXFamily(FlowMatching):
    name: ClassVar[str] = "ltx"
    pipelines: ClassVar[tuple[str, ...]] = ("LTXPipeline",)
    default_targets: ClassVar[tuple[str, ...]] = (r"re:transformer_blocks\..*",)
    sampling: ClassVar[SamplingSettings] = SamplingSettings(161, 512, 704, 128, 50, 3.0, fps=25)
    guidance_can_stop: ClassVar[bool] = False
    # The sampler shifts by the number of tokens and ends its steps at `shift_terminal`: other levels of the same path.
    scheduler_options: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **{name: values for name, values in FlowMatching.scheduler_options.items() if name != "shift_terminal"},
        **DYNAMIC_SHIFT,
    }
    published: ClassVar[tuple[str, Mapping[str, Any]]] = ("ltx_video_2b", LTX_VIDEO_2B)

    @staticmethod
    def refusal(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> str | None:
        patch = [transformer_config.get(name, 1) for name in ("patch_size", "patch_size_t")]
        if patch != [1, 1]:
            return f"a token stands for one latent pixel of one latent frame here, found patches of {patch!s:.100}"
        return None

    @staticmethod
    def clip_step(transformer_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> ClipStep:
        """Raises ValueError for another VAE: its scale is part of the positions that the transformer reads."""
        halvings = 2 ** sum(vae_config.get("spatio_temporal_scaling", (True, True, True, False)))
        frames = vae_config.get("temporal_compression_ratio") or vae_config.get("patch_size_t", 1) * halvings
        pixels = vae_config.get("spatial_compression_ratio") or vae_config.get("patch_size", 4) * halvings
        if (frames, pixels) != (FRAMES, PIXELS):
            raise ValueError(f"its VAE joins {frames} frames and {pixels} pixels, those of LTX-Video {FRAMES} and {PIXELS}")
        return ClipStep(FRAMES, PIXELS, PIXELS)

    @staticmethod
    def transformer(config: Mapping[str, Any]) -> nn.Module:
        from diffusers import LTXVideoTransformer3DModel

        return LTXVideoTransformer3DModel(**config)

    @staticmethod
    def tiny_pipeline(seed: int = 0) -> Any:
        from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline
        from transformers import T5Config, T5EncoderModel

        tokenizer: Any = word_tokenizer()
        sizes: dict[str, Any] = {"block_out_channels": (8,) * 4, "layers_per_block": (1,) * 5}
        sizes |= {f"decoder_{name}": value for name, value in sizes.items()}
        with seeded(seed):
            vae = AutoencoderKLLTXVideo(latent_channels=LATENT_CHANNELS, timestep_conditioning=True, **sizes)
            text_encoder = T5EncoderModel(T5Config(**t5_sizes(tokenizer))).eval()
        return LTXPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae.eval(),
            # The published models' settings, but for shift_terminal = 0.1, with which a single step has no schedule.
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_shift=0.95,
                max_shift=2.05,
                base_image_seq_len=1024,
                max_image_seq_len=4096,
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
        frames, height, width = latents.shape[2:]
        tokens = model(
            hidden_states=as_tokens(latents),
            timestep=timestep,
            encoder_hidden_states=text,
            encoder_attention_mask=text_mask(text),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(FRAMES / self.sampling.fps, PIXELS, PIXELS),
            return_dict=False,
        )[0]
        return from_tokens(tokens, (frames, height, width))

    def arguments(self, pipeline: Any, text: torch.Tensor, negative: torch.Tensor | None, size: ClipSize) -> dict[str, Any]:
        masked = prompts(text, negative, mask=True)
        return super().arguments(pipeline, text, negative, size) | masked | {"frame_rate": self.sampling.fps}

    def unpacked(self, latents: torch.Tensor, size: ClipSize) -> torch.Tensor:
        shape = (size.frames - 1) // FRAMES + 1, size.height // PIXELS, size.width // PIXELS
        return from_tokens(latents, shape)

    def foldable_inputs(self, model: nn.Module) -> list[FoldableInput]:
        parts: Any = model
        return ada_norm_single_inputs(model, parts.time_embed.linear)

    def encode_text(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> torch.Tensor:
        return encode_masked(pipeline, prompts, max_sequence_length)

    def encode_clips(self, pipeline: Any, clips: torch.Tensor) -> torch.Tensor:
        vae = pipeline.vae
        latents = vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mean
        return pipeline._normalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)

    def decode_latents(self, pipeline: Any, latents: torch.Tensor, frames: int) -> torch.Tensor:
        """Without the noise that some VAEs of LTX-Video can be given, as in the pipeline by default."""
        vae = pipeline.vae
        latents = latents.to(vae.device).float()
        latents = pipeline._denormalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
        timestep = torch.zeros(len(latents), device=vae.device, dtype=vae.dtype) if vae.config.timestep_conditioning else None
        return vae.decode(latents.to(vae.dtype), timestep).sample.float().clamp(-1, 1)


def tiny_transformer(seed: int = 0) -> Any:
    """2 layers, 2 heads of 16, in evaluation mode. Latents (n, 4, t, h, w), text (n, l, 16)."""
    with seeded(seed):
        return LTXFamily.transformer(TINY).eval()
