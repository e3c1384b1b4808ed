"""CogVideoX 2B / 5B text-to-video: discrete diffusion with velocity prediction on latents (n, t, c, h, w)."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from qvgen.models.family import NUM_TRAIN_TIMESTEPS
from qvgen.models.folding import FoldableInput, linear_fold, modulation_fold


class CogVideoXFamily:
    name = "cogvideox"
    default_targets: tuple[str, ...] = (r"re:transformer_blocks\..*",)

    def __init__(self, scheduler_config: dict[str, Any]) -> None:
        from diffusers import CogVideoXDDIMScheduler

        self._scheduler: Any = CogVideoXDDIMScheduler.from_config(scheduler_config)

    def sample_timesteps(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Uniform over the 1,000 discrete levels."""
        return torch.randint(NUM_TRAIN_TIMESTEPS, (n,), generator=generator).float()

    def timesteps_at(self, u: torch.Tensor, *, uniform: bool = False) -> torch.Tensor:
        return torch.floor(NUM_TRAIN_TIMESTEPS * u)

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self._scheduler.add_noise(clean, noise, timestep.long())

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """v = sqrt(ᾱ) noise - sqrt(1 - ᾱ) clean."""
        return self._scheduler.get_velocity(clean, noise, timestep.long())

    def predict(self, model: nn.Module, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return model(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=text,
            image_rotary_emb=_rotary_embedding(model, latents),
            return_dict=False,
        )[0]

    def foldable_inputs(self, model: nn.Module) -> list[FoldableInput]:
        """Per block: what q, k and v read and what the feed-forward reads (both modulated by a linear layer of the block's
        own), and what the output projection reads."""
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

    def encode_text(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> torch.Tensor:
        text, _ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return text

    def encode_clips(self, pipeline: Any, clips: torch.Tensor) -> torch.Tensor:
        latents = pipeline.vae.encode(clips.to(pipeline.vae.dtype)).latent_dist.mean
        latents = latents.permute(0, 2, 1, 3, 4) * pipeline.vae_scaling_factor_image
        patch = pipeline.transformer.config.patch_size_t
        if patch is not None and latents.shape[1] % patch:
            # CogVideoX 1.5 patches time: the pipeline pads in front with copies, and drops them after sampling.
            missing = patch - latents.shape[1] % patch
            latents = torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], dim=1)
        return latents

    def decode_latents(self, pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
        return pipeline.decode_latents(latents.to(pipeline.vae.dtype)).float().clamp(-1, 1)


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
