"""Equations that several families share: how noise is added, what the transformer predicts, which levels are trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, Self

import torch

from qvgen.models.family import Family
from qvgen.models.files import GENERATION, GUIDANCE
from qvgen.quant.primitives import NUM_TRAIN_TIMESTEPS

_NOTHING: Mapping[str, Any] = MappingProxyType({})
# Options of samplers that shift by the number of tokens.
DYNAMIC_SHIFT: Mapping[str, tuple[Any, ...]] = {"use_dynamic_shifting": (True, False), "time_shift_type": ("exponential",)}
MOST_SHIFT = 80  # whose exponential is a float32


class FlowMatching(Family, Protocol):
    """Noise and targets of flow matching: a straight path from data to noise, its levels shifted by one number.

    Samplers that shift by the number of tokens (`DYNAMIC_SHIFT`) have other levels of the same path for each size."""

    scheduler_options: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "num_train_timesteps": (NUM_TRAIN_TIMESTEPS,),
        "prediction_type": ("flow_prediction",),
        "use_flow_sigmas": (True,),
        "use_dynamic_shifting": (False,),
        "use_karras_sigmas": (False, None),
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
        "use_lu_lambdas": (False, None),
        "shift_terminal": (None,),
        "invert_sigmas": (False,),
        "sigma_min": (None,),
        "sigma_max": (None,),
    }
    shift: float

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = shift

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any], index: Mapping[str, Any] = _NOTHING) -> Self:
        """Training has one shift for clips of any size: where the sampler shifts by size, that of as many tokens as
        `max_image_seq_len` says, 4,096 of images of 1024 x 1024 in Flux and of 121 frames of 512 x 512 in LTX-Video."""
        return cls(sampler_shift(config))

    def sample_timesteps(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Uniform noise levels, shifted as the sampler shifts its own."""
        return self.timesteps_at(torch.rand(n, generator=generator))

    def timesteps_at(self, u: torch.Tensor, *, uniform: bool = False) -> torch.Tensor:
        low, high = self.noise_range
        if not uniform:  # the quantiles of the two ends
            low, high = (x if x in (0, 1) else x / (self.shift - (self.shift - 1) * x) for x in (low, high))
        u = low + (high - low) * u
        return NUM_TRAIN_TIMESTEPS * (u if uniform else self.shift * u / (1 + (self.shift - 1) * u))

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        sigma = (timestep / NUM_TRAIN_TIMESTEPS).to(clean.dtype).view(-1, *[1] * (clean.ndim - 1))
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The velocity of the straight path from data to noise."""
        return noise - clean


def sampler_shift(config: Mapping[str, Any]) -> float:
    """Of a scheduler's noise levels. Raises ValueError for one that is no number above 0: at 0 every level is 0."""
    dynamic = config.get("use_dynamic_shifting")
    name = "max_shift" if dynamic else "shift" if "shift" in config else "flow_shift"
    shift = config.get(name, 1.15 if dynamic else 1.0)
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift <= MOST_SHIFT:
        raise ValueError(
            f"scheduler option {name} = {shift!r:.100} must be a number above 0, at most {MOST_SHIFT} (scheduler_config.json)"
        )
    return math.exp(shift) if dynamic else float(shift)


class ToldGuidance(FlowMatching, Protocol):
    """Flow matching by a transformer that was distilled to read the guidance scale. In training and calibration it reads the
    one that generation.json says, or else `sampling`."""

    guidance_is_told: ClassVar[bool] = True
    guidance_scale: float

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any], index: Mapping[str, Any] = _NOTHING) -> Self:
        """Raises ValueError for a guidance scale that is no number of at least 1."""
        family, scale = super().from_scheduler(config), index.get(GUIDANCE, cls.sampling.guidance_scale)
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 1 <= scale < math.inf:
            raise ValueError(f"{GENERATION}: {GUIDANCE} = {scale!r:.100} must be a number, at least 1")
        family.guidance_scale = float(scale)
        return family


def check_told(family: Family, guidance_scale: float) -> None:
    """Raises ValueError if evaluation would tell a transformer another guidance scale than training does."""
    if guidance_scale != (told := getattr(family, "guidance_scale", guidance_scale)):
        raise ValueError(
            f"evaluate.guidance_scale = {guidance_scale:g}, but calibration and training tell the transformer {told:g}, that "
            "of its generation.json or else its pipeline: make them the same"
        )


class DiscreteNoise(Family, Protocol):
    """Noise of a diffusion process with 1,000 levels, all equally likely in training."""

    noising: Any  # a scheduler of diffusers with these levels

    def __init__(self, scheduler_config: Mapping[str, Any]) -> None: ...

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any], index: Mapping[str, Any] = _NOTHING) -> Self:
        """Raises ValueError for a scheduler of another kind of noise."""
        if config and "beta_schedule" not in config:
            raise ValueError(
                f"scheduler {config.get('_class_name')!r:.100} has no beta_schedule: it changes noise levels or the target in "
                f"a way that training and evaluation of {cls.name} do not follow"
            )
        return cls(config)

    def sample_timesteps(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Uniform over the 1,000 discrete levels."""
        return torch.randint(NUM_TRAIN_TIMESTEPS, (n,), generator=generator).float()

    def timesteps_at(self, u: torch.Tensor, *, uniform: bool = False) -> torch.Tensor:
        return torch.floor(NUM_TRAIN_TIMESTEPS * u)

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.noising.add_noise(clean, noise, timestep.long())
