"""What the library must know about a family of video diffusion transformers: one protocol, one adapter per family."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from qvgen.models.folding import FoldableInput

GENERATION = "generation.json"  # beside model_index.json: how this model is meant to be sampled
NUM_TRAIN_TIMESTEPS = 1000  # both families number noise levels 0 (clean) to 1000 (noise)


@dataclass(frozen=True)
class ClipSize:
    """Frames and pixels of a clip, and the number of text tokens the model was trained with."""

    frames: int
    height: int
    width: int
    max_sequence_length: int


class Family(Protocol):
    """Adapter of one family. Latents have whatever layout the transformer takes; only the adapter looks inside."""

    name: str
    default_targets: tuple[str, ...]  # linear layers of the transformer blocks, as patterns of QuantScheme

    def sample_timesteps(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Training timesteps (n,) float32 in [0, 1000], distributed as the family trains."""
        ...

    def timesteps_at(self, u: torch.Tensor, *, uniform: bool = False) -> torch.Tensor:
        """Quantiles u (n,) in [0, 1) of the timesteps the family trains with, or of equally likely ones, float32."""
        ...

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Noisy latents at `timestep` (n,), shaped like `clean` (n, ...)."""
        ...

    def predict(self, model: nn.Module, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The transformer's own prediction (velocity), shaped like `latents`; `timestep` (n,), `text` (n, l, d)."""
        ...

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """What the transformer was trained to predict for `add_noise(clean, noise, timestep)`."""
        ...

    def foldable_inputs(self, model: nn.Module) -> list[FoldableInput]:
        """Inputs of the transformer's linear layers that can be shifted or scaled per channel for nothing."""
        ...

    def encode_text(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> torch.Tensor:
        """Text embeddings (n, max_sequence_length, d) as the pipeline feeds them to the transformer."""
        ...

    def encode_clips(self, pipeline: Any, clips: torch.Tensor) -> torch.Tensor:
        """Normalised latents of clips (n, 3, t, h, w) in [-1, 1]."""
        ...

    def decode_latents(self, pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
        """Clips (n, 3, t, h, w) in [-1, 1] of normalised latents; the inverse of `encode_clips`."""
        ...


def family_of(pipeline_class: str, scheduler_config: dict[str, Any]) -> Family:
    """Adapter for a diffusers pipeline class name. Raises ValueError for a family that is not supported."""
    from qvgen.models.cogvideox import CogVideoXFamily
    from qvgen.models.wan import WanFamily

    if pipeline_class == "WanPipeline":
        return WanFamily(shift=float(scheduler_config.get("shift", scheduler_config.get("flow_shift", 1.0))))
    if pipeline_class == "CogVideoXPipeline":
        return CogVideoXFamily(scheduler_config)
    raise ValueError(f"pipeline {pipeline_class!r} is not supported; supported: WanPipeline, CogVideoXPipeline")


def load_family(folder: str | Path) -> Family:
    """Adapter for a diffusers pipeline folder, by its model_index.json."""
    folder = Path(folder)
    index = json.loads((folder / "model_index.json").read_text())
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return family_of(index["_class_name"], scheduler)


def read_guidance_stop(folder: str | Path) -> float:
    """The cleanness from which a pipeline folder is meant to be sampled without guidance; 1 (never) unless its
    generation.json says otherwise."""
    path = Path(folder) / GENERATION
    return float(json.loads(path.read_text()).get("guidance_stop", 1.0)) if path.is_file() else 1.0


def load_pipeline(folder: str | Path) -> Any:
    """A diffusers pipeline on the CPU in evaluation mode: local files and safetensors only, packed or not.

    A packed transformer needs `import qvgen.integrations.diffusers` first; callers above that layer do it.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()  # bars for files that load in milliseconds
    transformers_logging.disable_progress_bar()
    pipeline = DiffusionPipeline.from_pretrained(Path(folder), local_files_only=True, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    size: ClipSize,
    *,
    inference_steps: int,
    guidance_scale: float,
    guidance_stop: float = 1.0,
) -> torch.Tensor:
    """Latents sampled by a diffusers pipeline; those of all families take the same arguments.

    Each clip has its own seed, so it does not depend on the batch it is generated in (up to floating-point reductions).
    Guidance is off from cleanness (1 - t / 1000) `guidance_stop` on. Raises ValueError for a stop below 1 with a family whose
    pipeline fixes guidance before its first step (CogVideoX).
    """
    gate = {}
    if guidance_stop < 1:
        if type(pipeline).__name__ != "WanPipeline":
            raise ValueError(f"{type(pipeline).__name__} cannot stop guidance on its way; guidance_stop must be 1")
        gate = {"callback_on_step_end": partial(_gate_guidance, guidance_stop), "callback_on_step_end_tensor_inputs": []}
    return pipeline(
        prompt=list(prompts),
        negative_prompt=[""] * len(prompts),
        height=size.height,
        width=size.width,
        num_frames=size.frames,
        max_sequence_length=size.max_sequence_length,
        num_inference_steps=inference_steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **gate,
    ).frames


def _gate_guidance(stop: float, pipeline: Any, step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
    """Called after each step: the next one is without guidance if it is clean enough."""
    timesteps = pipeline.scheduler.timesteps
    if step + 1 < len(timesteps) and 1 - float(timesteps[step + 1]) / NUM_TRAIN_TIMESTEPS >= stop:
        pipeline._guidance_scale = 1.0  # what its loop asks; diffusers has no public way
    return {}
