"""HunyuanVideo: text.py (text-to-video)."""

from qvgen.models.hunyuan.text import HUNYUAN_VIDEO, TINY, HunyuanVideoFamily, tiny_transformer

__all__ = ["HUNYUAN_VIDEO", "TINY", "HunyuanVideoFamily", "tiny_transformer"]
