"""Flux: text.py (text-to-image)."""

from qvgen.models.flux.text import FLUX_1_DEV, TINY, FluxFamily, tiny_transformer

__all__ = ["FLUX_1_DEV", "TINY", "FluxFamily", "tiny_transformer"]
