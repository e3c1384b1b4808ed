"""Qwen-Image: text.py (text-to-image)."""

from qvgen.models.qwen_image.text import QWEN_IMAGE, TINY, QwenImageFamily, tiny_transformer

__all__ = ["QWEN_IMAGE", "TINY", "QwenImageFamily", "tiny_transformer"]
