"""CogVideoX: text.py (text-to-video)."""

from qvgen.models.cogvideox.text import COGVIDEOX_2B, TINY, CogVideoXFamily, tiny_transformer

__all__ = ["COGVIDEOX_2B", "TINY", "CogVideoXFamily", "tiny_transformer"]
