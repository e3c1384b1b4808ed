"""A transformer of a published architecture with random weights, on disk in the variants that a user may load."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel
from torch import Tensor, nn

from bench.true_width import PUBLISHED
from qvgen.checkpoint.packed import export_pipeline
from qvgen.evaluation.cost.size import write_variant
from qvgen.models.cogvideox import COGVIDEOX_2B, CogVideoXFamily
from qvgen.models.family import Family
from qvgen.models.wan import WAN_2_1_1_3B, WanFamily
from qvgen.nn.packed_linear import packed_layers
from qvgen.nn.swap import convert_, prepare_
from qvgen.quant.scheme import QuantScheme

# The tiny one is for tests of the harness.
_TINY = {"num_attention_heads": 2, "attention_head_dim": 32, "text_dim": 48, "freq_dim": 32, "ffn_dim": 160}
# What bench.dit_step measures: the family, and its configuration.
MODELS: dict[str, tuple[type[Family], dict[str, Any]]] = {
    **{
        name: (PUBLISHED[name].family, dict(PUBLISHED[name].transformer))
        for name in ("wan2.1-1.3b", "wan2.1-14b", "cogvideox-2b")
    },
    "tiny": (WanFamily, WAN_2_1_1_3B | _TINY),
    "tiny-cogvideox": (CogVideoXFamily, dict(COGVIDEOX_2B) | {"num_attention_heads": 2, "text_embed_dim": 48}),
}
ON_CPUS = tuple(name for name in MODELS if name != "wan2.1-14b")
TEXT_TOKENS = 512
FRAME = (30, 52)  # tokens of a frame of 480 x 832 pixels
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "packed": "bfloat16"}  # of everything but the packed layers


def write_folders(model: str, layers: int, folder: Path) -> dict[str, Path]:
    """Pipeline folders {"fp32", "bf16", "packed"} below `folder`, of transformers only. Packing is plain rounding: it takes
    as long to run as any other W4A4."""
    torch.manual_seed(0)
    family, config = MODELS[model]
    transformer: Any = family.transformer(config | {"num_layers": layers}).eval()
    folders = {name: folder / name for name in DTYPES}
    (folders["fp32"] / "scheduler").mkdir(parents=True)
    (folders["fp32"] / "model_index.json").write_text(json.dumps({"_class_name": family.pipelines[0]}))
    of_cogvideox = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    scheduler = of_cogvideox if family is CogVideoXFamily else {}
    (folders["fp32"] / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    transformer.save_pretrained(folders["fp32"] / "transformer")
    write_variant(folders["fp32"], folders["bf16"], DTYPES["bf16"])

    scheme = QuantScheme()
    prepare_(transformer, scheme, default_targets=family.default_targets)
    convert_(transformer)
    export_pipeline(folders["fp32"], transformer, scheme, folders["packed"], torch.bfloat16)
    return folders


def load(folder: Path, dtype: str) -> Any:
    """As a user does, packed or not."""
    return AutoModel.from_pretrained(
        str(folder / "transformer"), dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True
    ).eval()


def inputs(model: str, tokens: int) -> dict[str, Tensor]:
    """What one denoising step gets: latents (1, 16, t, h, w), or (1, t, 16, h, w) of CogVideoX, with `tokens` patches,
    timestep (1,), and text (1, 512, d) or (1, 226, d)."""
    (family, config), generator = MODELS[model], torch.Generator().manual_seed(0)
    patch = config["patch_size"]
    sizes = patch if isinstance(patch, tuple | list) else (1, patch, patch)
    t, h, w = (n * size for n, size in zip(token_grid(tokens), sizes, strict=True))
    latents = _latents(family, config, t, h, w)
    return {
        "latents": torch.randn(latents, generator=generator),
        "timestep": torch.tensor([500.0]),
        "text": torch.randn(_text(family, config), generator=generator),
    }


def _latents(family: type[Family], config: Mapping[str, Any], t: int, h: int, w: int) -> tuple[int, ...]:
    channels = config["in_channels"]
    return (1, channels, t, h, w) if family is WanFamily else (1, t, channels, h, w)


def _text(family: type[Family], config: Mapping[str, Any]) -> tuple[int, ...]:
    if family is WanFamily:
        return 1, TEXT_TOKENS, config["text_dim"]
    return 1, config["max_text_seq_length"], config["text_embed_dim"]


def token_grid(tokens: int) -> tuple[int, int, int]:
    """Frames, height and width in tokens: whole frames of 480 x 832 pixels, or one frame that is as square as can be."""
    height, width = FRAME
    if tokens % (height * width) == 0:
        return tokens // (height * width), height, width
    height = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
    return 1, height, tokens // height


def family_inputs(model: str, frames: int, device: torch.device) -> dict[str, Tensor]:
    """What one denoising step of a video of 480 x 832 pixels gets on a GPU: bfloat16, one sample."""
    family, config = MODELS[model]
    generator, t = torch.Generator(device).manual_seed(0), (frames - 1) // 4 + 1
    latents, text = _latents(family, config, t, 60, 104), _text(family, config)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    return {"latents": normal(latents), "timestep": torch.tensor([500.0], device=device), "text": normal(text)}


def memory_bytes(model: nn.Module) -> int:
    """Of parameters, buffers and what backends prepared of packed weights, each memory counted once. Call it after a first
    step, before which packed layers are still as they were stored."""
    tensors: list[Tensor | None] = [*model.parameters(), *model.buffers()]
    for _, layer in packed_layers(model):
        tensors += [t for t in layer._prepared or () if isinstance(t, Tensor)]
    found = {t.data_ptr(): t.nbytes for t in tensors if t is not None}
    return sum(found.values())
