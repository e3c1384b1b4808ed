"""Sana: text.py (text-to-image)."""

from qvgen.models.sana.text import SANA_1600M, TINY, SanaFamily, tiny_transformer

__all__ = ["SANA_1600M", "TINY", "SanaFamily", "tiny_transformer"]
