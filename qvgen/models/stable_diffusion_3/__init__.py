"""Stable Diffusion 3 and 3.5: text.py (text-to-image)."""

from qvgen.models.stable_diffusion_3.text import (
    STABLE_DIFFUSION_3_5_MEDIUM,
    TINY,
    StableDiffusion3Family,
    tiny_transformer,
)

__all__ = ["STABLE_DIFFUSION_3_5_MEDIUM", "TINY", "StableDiffusion3Family", "tiny_transformer"]
