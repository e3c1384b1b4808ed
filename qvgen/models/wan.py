"""Wan 2.1 / 2.2 text-to-video: flow matching on latents (n, c, t, h, w)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qvgen.models.family import NUM_TRAIN_TIMESTEPS
from qvgen.models.folding import Fold, FoldableInput, affine_fold, linear_fold, shared_modulation_fold, shift_fold


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
        """Of all blocks at once: what q, k and v of self-attention read and what the feed-forward reads (both modulated by one
        projection of the timestep, so scaled together), and the text. Per block: these two shifted, in the block's table;
        what the output projections read; and what the cross-attention's query reads (its norm is affine)."""
        blocks: list[Any] = list(model.get_submodule("blocks").children())
        names = [f"blocks.{i}" for i in range(len(blocks))]
        embedder: Any = model.get_submodule("condition_embedder")
        attention = [tuple(f"{name}.attn1.to_{x}" for x in "qkv") for name in names]
        feed_forward = tuple(f"{name}.ffn.net.0.proj" for name in names)
        text = tuple(f"{name}.attn2.to_{x}" for name in names for x in "kv")
        found = [
            FoldableInput(sum(attention, ()), _modulated(embedder.time_proj, blocks, 0), shifts=False),
            FoldableInput(feed_forward, _modulated(embedder.time_proj, blocks, 3), shifts=False),
            FoldableInput(text, linear_fold(embedder.text_embedder.linear_2)),
        ]
        for name, block, read in zip(names, blocks, attention, strict=True):
            table = block.scale_shift_table[0]  # rows: shift, scale, gate of self-attention, then of the feed-forward
            found.append(FoldableInput(read, shift_fold(table[0]), scales=False))
            found.append(FoldableInput((f"{name}.ffn.net.0.proj",), shift_fold(table[3]), scales=False))
            for part in ("attn1", "attn2"):
                value = block.get_submodule(part).to_v
                found.append(FoldableInput((f"{name}.{part}.to_out.0",), linear_fold(value)))
            if getattr(block.norm2, "weight", None) is not None:
                found.append(FoldableInput((f"{name}.attn2.to_q",), affine_fold(block.norm2.weight, block.norm2.bias)))
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


def _modulated(time_proj: nn.Linear, blocks: Sequence[Any], first: int) -> Fold:
    """Of the inputs that rows `first` (shift) and `first` + 1 (scale) of the tables modulate."""
    width = time_proj.out_features // 6
    offset, factor = (slice(row * width, (row + 1) * width) for row in (first, first + 1))
    return shared_modulation_fold(time_proj, (offset, factor), [b.scale_shift_table[0, first : first + 2] for b in blocks])


def _latent_statistics(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, -1, 1, 1, 1)
    return torch.tensor(vae.config.latents_mean).view(shape), torch.tensor(vae.config.latents_std).view(shape)
