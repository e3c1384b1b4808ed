"""CogVideoX 2B / 5B / 1.5 text-to-video: discrete diffusion with velocity prediction on latents (n, t, c, h, w)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn

from qvgen.models.family import ClipStep, SamplingSettings
from qvgen.models.folding import FoldableInput, linear_fold, modulation_fold
from qvgen.models.noise import DiscreteNoise
from qvgen.models.tiny import LATENT_CHANNELS, TEXT_DIM, TINY_CLIP, seeded, t5_sizes, word_tokenizer
from qvgen.quant.primitives import NUM_TRAIN_TIMESTEPS

# transformer/config.json of CogVideoX 2B in diffusers format.
COGVIDEOX_2B: Mapping[str, Any] = {
    "num_attention_heads": 30,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "time_embed_dim": 512,
    "text_embed_dim": 4096,
    "num_layers": 30,
    "sample_width": 90,
    "sample_height": 60,
    "sample_frames": 49,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 226,
}
TINY: Mapping[str, Any] = {
    **COGVIDEOX_2B,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "time_embed_dim": 12,
    "text_embed_dim": TEXT_DIM,
    "num_layers": 2,
    "sample_width": TINY_CLIP.width // 8,
    "sample_height": TINY_CLIP.height // 8,
    "sample_frames": TINY_CLIP.frames,
    "max_text_seq_length": TINY_CLIP.max_sequence_length,
}


class CogVideoXFamily(DiscreteNoise):
    name: ClassVar[str] = "cogvideox"
    pipelines: ClassVar[tuple[str, ...]] = ("CogVideoXPipeline",)
    default_targets: ClassVar[tuple[str, ...]] = (r"re:transformer_blocks\..*",)
    sampling: ClassVar[SamplingSettings] = SamplingSettings(49, 480, 720, 226, 50, 6.0, fps=8)
    guidance_can_stop: ClassVar[bool] = False
    scheduler_options: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "num_train_timesteps": (NUM_TRAIN_TIMESTEPS,),
        "prediction_type": ("v_prediction",),
    }
    published: ClassVar[tuple[str, Mapping[str, Any]]] = ("cogvideox_2b", COGVIDEOX_2B)

    def __init__(self, scheduler_config: Mapping[str, Any]) -> None:
        from diffusers import CogVideoXDDIMScheduler

        self.noising: Any = CogVideoXDDIMScheduler.from_config(dict(scheduler_config))

    @staticmethod
    def refusal(index: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> str | None:
        channels = [transformer_config.get(name, 16) for name in ("in_channels", "out_channels")]
        if channels[0] != (channels[1] or channels[0]) or transformer_config.get("ofs_embed_dim") is not None:
            found = "{} input channels for {}".format(*channels)
            return f"the transformer is conditioned on images ({found}), which no stage encodes; give a text-to-video model"
        return None

    @staticmethod
    def clip_step(transformer_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> ClipStep:
        """The VAE decodes latent frames by twos, the first three together: only an odd number comes back as it went in."""
        frames = 2 * vae_config.get("temporal_compression_ratio", 4)
        halvings = len(vae_config.get("block_out_channels", (128, 256, 256, 512))) - 1
        pixels = 2**halvings * transformer_config.get("patch_size", 2)
        return ClipStep(frames, pixels, pixels)

    @staticmethod
    def text_tokens(transformer_config: Mapping[str, Any]) -> int | None:
        """Of CogVideoX 2B: its table of positions has rows for the text too."""
        if transformer_config.get("use_rotary_positional_embeddings"):
            return None
        return transformer_config.get("max_text_seq_length", COGVIDEOX_2B["max_text_seq_length"])

    @classmethod
    def sampling_of(cls, transformer_config: Mapping[str, Any]) -> SamplingSettings:
        fps = cls.sampling.fps if transformer_config.get("patch_size_t") is None else 16  # CogVideoX 1.5
        return replace(cls.sampling, fps=fps)

    @staticmethod
    def transformer(config: Mapping[str, Any]) -> nn.Module:
        from diffusers import CogVideoXTransformer3DModel

        return CogVideoXTransformer3DModel(**config)

    @staticmethod
    def tiny_pipeline(seed: int = 0, **options: bool) -> Any:
        """Options: those of `tiny_transformer`."""
        from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline
        from transformers import T5Config, T5EncoderModel

        tokenizer = word_tokenizer()
        with seeded(seed):
            vae = AutoencoderKLCogVideoX(
                block_out_channels=(8, 8, 8, 8),  # type: ignore[arg-type]  (annotated as one number)
                latent_channels=LATENT_CHANNELS,
                layers_per_block=1,
                norm_num_groups=2,
                temporal_compression_ratio=4,
                sample_height=TINY_CLIP.height,
                sample_width=TINY_CLIP.width,
            )
            text_encoder = T5EncoderModel(T5Config(**t5_sizes(tokenizer))).eval()
        return CogVideoXPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae.eval(),
            # The published models' settings.
            scheduler=CogVideoXDDIMScheduler(
                beta_schedule="scaled_linear",
                beta_start=0.00085,
                beta_end=0.012,
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                snr_shift_scale=3.0,
                timestep_spacing="trailing",
            ),
            transformer=tiny_transformer(seed=seed, **options),
        )

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """v = sqrt(ᾱ) noise - sqrt(1 - ᾱ) clean."""
        return self.noising.get_velocity(clean, noise, timestep.long())

    def predict(
        self,
        model: nn.Module,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        image: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return model(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=text,
            image_rotary_emb=_rotary_embedding(model, latents),
            return_dict=False,
        )[0]

    def foldable_inputs(self, model: nn.Module) -> list[FoldableInput]:
        """Per block: the input of q, k and v and that of the feed-forward, which a linear layer of the block modulates; and
        the input of the output projection."""
        found = []
        for i, block in enumerate(model.get_submodule("transformer_blocks").children()):
            parts: Any = block
            prefix, width = f"transformer_blocks.{i}", parts.norm1.norm.normalized_shape[0]
            # The modulation of video, then that of text: shift, scale and gate of each.
            shift, scale, _, text_shift, text_scale, _ = (slice(j * width, (j + 1) * width) for j in range(6))
            rows = [(shift, scale), (text_shift, text_scale)]
            attention = tuple(f"{prefix}.attn1.to_{x}" for x in "qkv")
            candidates = [
                FoldableInput(attention, modulation_fold(parts.norm1.linear, rows)),
                FoldableInput((f"{prefix}.ff.net.0.proj",), modulation_fold(parts.norm2.linear, rows)),
                FoldableInput((f"{prefix}.attn1.to_out.0",), linear_fold(parts.attn1.to_v)),
            ]
            # Biases are options of this model; a shift needs them.
            found += [c for c in candidates if parts.attn1.to_v.bias is not None and _have_bias(model, c.layers)]
        return found

    def encode_clips(self, pipeline: Any, clips: torch.Tensor) -> torch.Tensor:
        latents = pipeline.vae.encode(clips.to(pipeline.vae.device, pipeline.vae.dtype)).latent_dist.mean
        latents = latents.permute(0, 2, 1, 3, 4) * pipeline.vae_scaling_factor_image
        patch = pipeline.transformer.config.patch_size_t
        if patch is not None and latents.shape[1] % patch:
            # CogVideoX 1.5 patches time: the pipeline pads in front with copies, and drops them after sampling.
            missing = patch - latents.shape[1] % patch
            latents = torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], dim=1)
        return latents

    def decode_latents(self, pipeline: Any, latents: torch.Tensor, frames: int) -> torch.Tensor:
        padding = latents.shape[1] - ((frames - 1) // pipeline.vae_scale_factor_temporal + 1)
        latents = latents[:, padding:]
        return pipeline.decode_latents(latents.to(pipeline.vae.device, pipeline.vae.dtype)).float().clamp(-1, 1)


def tiny_transformer(rotary: bool = False, temporal_patch: bool = False, seed: int = 0) -> Any:
    """2 layers, 2 heads of 16, in evaluation mode. `rotary` as in 5B, without as in 2B; `temporal_patch` with patches of two
    latent frames, as in 1.5 (and rotary). Latents (n, t, 4, h, w) with t = 3 and h = w = 4, text (n, 8, 16)."""
    options = {"use_rotary_positional_embeddings": rotary or temporal_patch}
    if temporal_patch:
        options |= {"patch_size_t": 2, "patch_bias": False}
    with seeded(seed):
        return CogVideoXFamily.transformer({**TINY, **options}).eval()


def _have_bias(model: nn.Module, layers: Sequence[str]) -> bool:
    return all(model.get_submodule(name).bias is not None for name in layers)


def _rotary_embedding(model: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rotary tables of the 5B and 1.5 models (the 2B model has none), made by the pipeline's own function: it reads only
    the transformer's config and a spatial scale, which is 1 because we count in latent pixels."""
    if not model.config.use_rotary_positional_embeddings:
        return None
    from diffusers import CogVideoXPipeline

    frames, height, width = latents.shape[1], latents.shape[3], latents.shape[4]
    pipeline: Any = SimpleNamespace(transformer=model, vae_scale_factor_spatial=1)
    return CogVideoXPipeline._prepare_rotary_positional_embeddings(pipeline, height, width, frames, latents.device)
