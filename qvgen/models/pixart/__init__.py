"""PixArt: text.py (PixArt-Sigma, text-to-image)."""

from qvgen.models.pixart.text import PIXART_SIGMA_XL_2, TINY, PixArtFamily, tiny_transformer

__all__ = ["PIXART_SIGMA_XL_2", "TINY", "PixArtFamily", "tiny_transformer"]
