"""A real packed pipeline, small and untrained, as stage pack writes one: every component, generation.json, a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qvgen.checkpoint.packed import export_pipeline
from qvgen.checkpoint.pipeline import load_transformer
from qvgen.models.registry import load_family
from qvgen.models.tiny import TINY_CLIP, tiny_pipeline
from qvgen.nn.swap import convert_, prepare_
from qvgen.quant.scheme import QuantScheme

SETTINGS = {**vars(TINY_CLIP), "inference_steps": 2, "guidance_scale": 2.0, "fps": 8}


def make_packed(folder: Path, seed: int = 0, inference_steps: int = SETTINGS["inference_steps"]) -> Path:
    """Another `seed`, other weights. Five times `inference_steps` may be asked of a served model."""
    source, packed, scheme = folder / "full", folder / "packed", QuantScheme()
    tiny_pipeline("wan", source)
    (source / "generation.json").write_text(json.dumps(SETTINGS | {"inference_steps": inference_steps}))
    transformer, family = load_transformer(source), load_family(source)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05 * seed)
    prepare_(transformer, scheme, default_targets=family.default_targets)
    convert_(transformer)
    packed.mkdir()
    export_pipeline(source, transformer, scheme, packed, torch.bfloat16, "rtn", 1.0)
    return packed


@torch.no_grad()
def predict(family: Any, model: Any) -> torch.Tensor:
    """What a tiny transformer answers to a fixed input at two timesteps."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 4, 4, 4) if family.name == "cogvideox" else (2, 4, 3, 4, 4)
    latents, text = torch.randn(shape, generator=generator), torch.randn(2, 8, 16, generator=generator)
    return family.predict(model, latents, torch.tensor([30.0, 900.0]), text)
