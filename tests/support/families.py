"""The two-layer pipelines that tests of all families run on, by name, and inputs that fit their transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from qvgen.models.family import ClipSize
from qvgen.models.files import EXPERT, MANIFEST
from qvgen.models.tiny import TINY_CLIP, TINY_IMAGE, tiny_pipeline


@dataclass(frozen=True)
class Kind:
    """`latents`: of one clip as stage prepare stores them, of TINY_CLIP (and of a larger one for ltx, to which it is two
    tokens); `image`: embeddings of its first frame, if any."""

    family: str
    latents: tuple[int, ...]
    image: tuple[int, int] = (0, 0)
    text: int = 8  # tokens
    clip: ClipSize = TINY_CLIP
    options: Mapping[str, bool] = field(default_factory=dict)

    def inputs(self, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random latents, text and image of n samples. A mask among the latents is as random as they are."""
        generator = torch.Generator().manual_seed(seed)
        shapes = self.latents, (self.text, 16), self.image
        latents, text, image = (torch.randn(n, *shape, generator=generator) for shape in shapes)
        return latents, text, image


_VIDEO = (4, 3, 4, 4)
_WITH_FRAME = (12, 3, 4, 4)  # and a mask of 4 channels, and the frame's 4
KINDS = {
    "wan": Kind("wan", _VIDEO),
    "wan_experts": Kind("wan", _VIDEO, options={"experts": True}),  # 2.2 A14B
    "wan_image": Kind("wan_image", _WITH_FRAME, (5, 8), text=512),  # 2.1 I2V
    "wan_image_experts": Kind("wan_image", _WITH_FRAME, options={"experts": True}),  # 2.2 I2V A14B
    "wan_image_expand": Kind("wan_image", _VIDEO, options={"expand": True}),  # 2.2 TI2V 5B with a first frame
    "wan_vace": Kind("wan_vace", _WITH_FRAME),  # and the frame's 4, and 4 of what is to be made
    "cogvideox": Kind("cogvideox", (3, 4, 4, 4)),
    "ltx": Kind("ltx", _VIDEO),
    "pixart": Kind("pixart", (4, 4, 4), clip=TINY_IMAGE),
    "flux": Kind("flux", (4, 4, 4), text=9, clip=TINY_IMAGE),  # and a row of pooled embeddings
    "hunyuan_video": Kind("hunyuan_video", _VIDEO, text=9),
    "flux_schnell": Kind("flux", (4, 4, 4), text=9, clip=TINY_IMAGE, options={"schnell": True}),
    "sana": Kind("sana", (4, 4, 4), clip=TINY_IMAGE),
    "qwen_image": Kind("qwen_image", (4, 4, 4), clip=TINY_IMAGE),
    "stable_diffusion_3": Kind("stable_diffusion_3", (4, 4, 4), text=17, clip=TINY_IMAGE),  # CLIP's tokens too
}


def make_kind(name: str, folder: Path, expert: str = "transformer_2") -> Path:
    """The pipeline of a kind in a folder, as stage fetch leaves it; of two transformers `expert` is the one to train."""
    kind = KINDS[name]
    tiny_pipeline(kind.family, folder, **kind.options)
    if "experts" in kind.options:
        (folder / MANIFEST).write_text(json.dumps({EXPERT: expert}))
    return folder
