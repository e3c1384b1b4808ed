"""Wan: text.py (T2V 2.1, both experts of 2.2, TI2V without an image), image.py (I2V 2.1 and 2.2, TI2V with one), vace.py."""

from qvgen.models.wan.text import TINY, WAN_2_1_1_3B, WanFamily, tiny_transformer

__all__ = ["TINY", "WAN_2_1_1_3B", "WanFamily", "tiny_transformer"]
