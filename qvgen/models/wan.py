"""Wan 2.1 / 2.2 text-to-video: flow matching on latents (n, c, t, h, w)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qvgen.models.family import NUM_TRAIN_TIMESTEPS
from qvgen.models.folding import FoldableInput, affine_fold, shift_fold, value_fold


class WanFamily:
    name = "wan"
    default_targets: tuple[str, ...] = (r"re:blocks\..*",)

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = shift

    def sample_timesteps(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Uniform noise levels, shifted as the sampler shifts its own."""
        return self.timesteps_at(torch.rand(n, generator=generator))

    def timesteps_at(self, u: torch.Tensor, *, uniform: bool = False) -> torch.Tensor:
        return NUM_TRAIN_TIMESTEPS * (u if uniform else self.shift * u / (1 + (self.shift - 1) * u))

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        sigma = (timestep / NUM_TRAIN_TIMESTEPS).to(clean.dtype).view(-1, *[1] * (clean.ndim - 1))
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The velocity of the straight path from data to noise."""
        return noise - clean

    def predict(self, model: nn.Module, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return model(hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]

    def foldable_inputs(self, model: nn.Module) -> list[FoldableInput]:
        """Per block: what q, k and v read and what the feed-forward reads (both modulated, so only shifted, in the block's
        table), what the output projections read, and what the cross-attention's query reads (its norm is affine)."""
        found = []
        for i, block in enumerate(model.get_submodule("blocks").children()):
            prefix = f"blocks.{i}"
            parts: Any = block
            table = parts.scale_shift_table[0]  # rows: shift, scale, gate of self-attention, then of the feed-forward
            attention = tuple(f"{prefix}.attn1.to_{x}" for x in "qkv")
            found.append(FoldableInput(attention, shift_fold(table[0]), scales=False))
            found.append(FoldableInput((f"{prefix}.ffn.net.0.proj",), shift_fold(table[3]), scales=False))
            for name in ("attn1", "attn2"):
                value = parts.get_submodule(name).to_v
                found.append(FoldableInput((f"{prefix}.{name}.to_out.0",), value_fold(value), scales=True))
            if getattr(parts.norm2, "weight", None) is not None:
                fold = affine_fold(parts.norm2.weight, parts.norm2.bias)
                found.append(FoldableInput((f"{prefix}.attn2.to_q",), fold, scales=True))
        return found

    def encode_text(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> torch.Tensor:
        text, _ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return text

    def encode_clips(self, pipeline: Any, clips: torch.Tensor) -> torch.Tensor:
        mean, std = _latent_statistics(pipeline.vae)
        return (pipeline.vae.encode(clips.to(pipeline.vae.dtype)).latent_dist.mean - mean) / std

    def decode_latents(self, pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
        mean, std = _latent_statistics(pipeline.vae)
        return pipeline.vae.decode(latents.to(pipeline.vae.dtype) * std + mean).sample.float()


def _latent_statistics(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, -1, 1, 1, 1)
    return torch.tensor(vae.config.latents_mean).view(shape), torch.tensor(vae.config.latents_std).view(shape)
