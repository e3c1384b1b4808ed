"""Predictions of one model on held-out latents, in batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from qvgen.data.stored import Latents, Text
from qvgen.models.family import Family
from qvgen.quant.primitives import NUM_TRAIN_TIMESTEPS
from qvgen.sampling.pieces import Pieces
from qvgen.sampling.sample import OnBatch, batches, lengths, silent

if TYPE_CHECKING:
    from diffusers import ModelMixin


def spread_timesteps(count: int, noise_range: tuple[float, float] = (0.0, 1.0)) -> list[float]:
    """`count` timesteps in the middle of equal parts of [0, 1000], or of a part of it: 10 gives 50, 150, ... 950."""
    low, high = noise_range
    first, share = low * NUM_TRAIN_TIMESTEPS, high - low
    return [first + share * ((i + 0.5) * NUM_TRAIN_TIMESTEPS / count) for i in range(count)]


def velocities(
    transformer: ModelMixin,
    family: Family,
    latents: Latents,
    text: Text,
    timesteps: Sequence[float],
    *,
    seed: int,
    batch_size: int,
    image: Latents | None = None,
) -> torch.Tensor:
    """Predicted velocities (timesteps, n, ...) float32, on the CPU, for clean latents (n, ...) made noisy at each timestep.

    `text` (n, l, d) are the captions' embeddings, `image` (n, m, e) those of the first frames.
    """
    predicted = Pieces(velocity_lengths(len(latents), timesteps, batch_size))
    add_velocities(predicted, transformer, family, latents, text, timesteps, seed=seed, batch_size=batch_size, image=image)
    return predicted.tensor().unflatten(0, (len(timesteps), len(latents)))


def velocity_lengths(count: int, timesteps: Sequence[float], batch_size: int) -> list[int]:
    """Rows of the pieces of `add_velocities`: the batches of `count` clips, at each timestep again."""
    return lengths(count, batch_size) * len(timesteps)


@torch.no_grad()
def add_velocities(
    predicted: Pieces,
    transformer: ModelMixin,
    family: Family,
    latents: Latents,
    text: Text,
    timesteps: Sequence[float],
    *,
    seed: int,
    batch_size: int,
    on_batch: OnBatch = silent,
    image: Latents | None = None,
) -> None:
    """The pieces of `predicted` that are to be made, of `velocities`.

    The noise depends on `seed` alone, so two models given the same arguments see the same inputs. Predictions are kept rather
    than compared at once, so that two large models need never be in memory together.
    """
    dtype, device = transformer.dtype, transformer.device
    generator = torch.Generator().manual_seed(seed)
    todo, parts = set(predicted.todo), batches(len(latents), batch_size)
    # torch draws 16 numbers at a time: clips of such a size get the same noise drawn for all or for some.
    separate = math.prod(latents.shape[1:]) % 16 == 0
    for t_number, timestep in enumerate(timesteps):
        noise = None if separate else torch.randn(latents.shape, generator=generator)
        for number, part in enumerate(parts, start=t_number * len(parts)):
            shape = (min(part.stop, len(latents)) - part.start, *latents.shape[1:])
            drawn = torch.randn(shape, generator=generator) if noise is None else noise[part]  # also for those that are there
            if number not in todo:
                continue
            clean = latents[part].to(device).float()
            t = torch.full((len(clean),), float(timestep), device=device)
            noisy = family.add_noise(clean, drawn.to(device), t)
            condition = [x[part].to(device, dtype) for x in (text, image) if x is not None]
            predicted.add(number, family.predict(transformer, noisy.to(dtype), t, *condition))
            on_batch(len(clean))
