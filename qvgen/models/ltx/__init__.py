"""LTX-Video: text.py (text-to-video)."""

from qvgen.models.ltx.text import LTX_VIDEO_2B, TINY, LTXFamily, tiny_transformer

__all__ = ["LTX_VIDEO_2B", "TINY", "LTXFamily", "tiny_transformer"]
