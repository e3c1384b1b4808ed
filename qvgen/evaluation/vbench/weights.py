"""The files that each dimension of VBench 0.1.5 loads: read from the package's source, not guessed.

The package downloads what it lacks; we never let it (see runner.py), so a missing file refuses its dimension.
`local=True` is how we call it, which is the only way to have all but two of them in one folder, VBench's cache.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

VBENCH_VERSION = "0.1.5"  # what this table was read from

# The eight that QVGen and the papers it compares with report.
PAPER_DIMENSIONS = (
    "imaging_quality",
    "aesthetic_quality",
    "overall_consistency",
    "scene",
    "background_consistency",
    "subject_consistency",
    "motion_smoothness",
    "dynamic_degree",
)


@dataclass(frozen=True)
class WeightFile:
    """A file below VBench's cache, or below the Hugging Face cache if `hub`; any of the patterns `paths` will do."""

    paths: tuple[str, ...]
    source: str  # where the package itself gets it
    licence: str
    hub: bool = False

    def expected(self, environment: Mapping[str, str] = os.environ) -> Path:
        """Where it is looked for first."""
        return (hub_cache(environment) if self.hub else vbench_cache(environment)) / self.paths[0]

    def found(self, environment: Mapping[str, str] = os.environ) -> bool:
        """Whether a file of more than no bytes is there."""
        root = hub_cache(environment) if self.hub else vbench_cache(environment)
        return any(path.is_file() and path.stat().st_size > 0 for pattern in self.paths for path in root.glob(pattern))


def vbench_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """VBENCH_CACHE_DIR, else ~/.cache/vbench: as in vbench/utils.py."""
    return Path(environment.get("VBENCH_CACHE_DIR") or "~/.cache/vbench").expanduser().absolute()


def hub_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of models--* that transformers reads."""
    for name in ("TRANSFORMERS_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"):
        if environment.get(name):
            return Path(environment[name]).expanduser().absolute()
    return Path(environment.get("HF_HOME") or "~/.cache/huggingface").expanduser().absolute() / "hub"


_CLIP = "https://openaipublic.azureedge.net/clip/models/"
_OPEN_GV_LAB = "https://huggingface.co/OpenGVLab/VBench_Used_Models/resolve/main/"
_BERT = "models--bert-base-uncased/snapshots/*/"

_CLIP_B = WeightFile(
    ("clip_model/ViT-B-32.pt",), f"{_CLIP}40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt", "MIT"
)
_CLIP_L = WeightFile(
    ("clip_model/ViT-L-14.pt",), f"{_CLIP}b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt", "MIT"
)
_VICLIP = (
    WeightFile(
        ("ViCLIP/ViClip-InternVid-10M-FLT.pth",),
        f"{_OPEN_GV_LAB}ViClip-InternVid-10M-FLT.pth",
        "Apache-2.0 (InternVideo's code); the data it was trained on is non-commercial",
    ),
    WeightFile(
        ("ViCLIP/bpe_simple_vocab_16e6.txt.gz",),
        "https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz",
        "MIT",
    ),
)

NEEDED: dict[str, tuple[WeightFile, ...]] = {
    "imaging_quality": (
        WeightFile(
            ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
            "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
            "CC BY-NC-SA 4.0 (weights), PolyForm Noncommercial (package pyiqa): not for commercial use",
        ),
    ),
    "aesthetic_quality": (
        _CLIP_L,
        WeightFile(
            ("aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",),
            "https://github.com/LAION-AI/aesthetic-predictor/blob/main/sa_0_4_vit_l_14_linear.pth?raw=true",
            "MIT",
        ),
    ),
    "overall_consistency": _VICLIP,
    "scene": (
        WeightFile(
            ("caption_model/tag2text_swin_14m.pth",),
            "https://huggingface.co/spaces/xinyu1205/recognize-anything/resolve/main/tag2text_swin_14m.pth",
            "Apache-2.0",
        ),
        WeightFile(
            (f"{_BERT}model.safetensors", f"{_BERT}pytorch_model.bin"),
            "https://huggingface.co/bert-base-uncased",
            "Apache-2.0",
            hub=True,
        ),
        WeightFile((f"{_BERT}vocab.txt",), "https://huggingface.co/bert-base-uncased", "Apache-2.0", hub=True),
    ),
    "background_consistency": (_CLIP_B,),
    "subject_consistency": (
        WeightFile(
            ("dino_model/facebookresearch_dino_main/hubconf.py",),
            "git clone https://github.com/facebookresearch/dino",
            "Apache-2.0",
        ),
        WeightFile(
            ("dino_model/dino_vitbase16_pretrain.pth",),
            "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
            "Apache-2.0",
        ),
    ),
    "motion_smoothness": (
        WeightFile(
            ("amt_model/amt-s.pth",),
            "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth",
            "CC BY-NC 4.0: not for commercial use",
        ),
    ),
    "dynamic_degree": (
        WeightFile(
            ("raft_model/models/raft-things.pth",),
            "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip",
            "BSD-3-Clause",
        ),
    ),
    "temporal_flickering": (),
    "temporal_style": _VICLIP,
    "appearance_style": (_CLIP_B,),
    "human_action": (
        WeightFile(
            ("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",),
            f"{_OPEN_GV_LAB}l16_ptk710_ftk710_ftk400_f16_res224.pth",
            "Apache-2.0 (Unmasked Teacher's code)",
        ),
    ),
}
_DETECTRON = ("object_class", "multiple_objects", "color", "spatial_relationship")


def check_dimensions(names: list[str]) -> list[str]:
    """`names` without repetitions. Raises ValueError for one that is not in the table."""
    for name in names:
        if name in _DETECTRON:
            raise ValueError(f"dimension {name} needs detectron2, which is not supported here; evaluate it with vbench itself")
        if name not in NEEDED:
            raise ValueError(f"dimension {name!r} is not one of {', '.join(NEEDED)}")
    return list(dict.fromkeys(names))


def missing(dimension: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Why a dimension is refused: each missing file, where the package gets it, its licence; None if all are there."""
    lacking = [file for file in NEEDED[dimension] if not file.found(environment)]
    return (
        "; ".join(f"{file.expected(environment)} is missing, from {file.source} ({file.licence})" for file in lacking) or None
    )
