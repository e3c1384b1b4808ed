"""A Wan transformer of a published architecture with random weights, on disk in the variants that a user may load."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock
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
ARCHITECTURES: dict[str, dict[str, Any]] = {"wan2.1-1.3b": WAN_2_1_1_3B, "tiny": WAN_2_1_1_3B | _TINY}
# What bench.dit_step measures on a GPU: the family, and its configuration.
ON_GPUS: dict[str, tuple[type[Family], dict[str, Any]]] = {
    **{
        name: (PUBLISHED[name].family, dict(PUBLISHED[name].transformer))
        for name in ("wan2.1-1.3b", "wan2.1-14b", "cogvideox-2b")
    },
    "tiny": (WanFamily, ARCHITECTURES["tiny"]),
    "tiny-cogvideox": (CogVideoXFamily, dict(COGVIDEOX_2B) | {"num_attention_heads": 2, "text_embed_dim": 48}),
}
TEXT_TOKENS = 512
FRAME = (30, 52)  # tokens of a frame of 480 x 832 pixels
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "packed": "bfloat16"}  # of everything but the packed layers


def write_folders(model: str, layers: int, folder: Path) -> dict[str, Path]:
    """Pipeline folders {"fp32", "bf16", "packed"} below `folder`, of transformers only. Packing is plain rounding: it takes
    as long to run as any other W4A4."""
    torch.manual_seed(0)
    config: dict[str, Any] = ARCHITECTURES[model] | {"num_layers": layers}
    transformer = WanTransformer3DModel(**config).eval()
    folders = {name: folder / name for name in DTYPES}
    (folders["fp32"] / "scheduler").mkdir(parents=True)
    (folders["fp32"] / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    (folders["fp32"] / "scheduler/scheduler_config.json").write_text("{}")
    transformer.save_pretrained(folders["fp32"] / "transformer")
    write_variant(folders["fp32"], folders["bf16"], DTYPES["bf16"])

    scheme = QuantScheme()
    prepare_(transformer, scheme, default_targets=WanFamily.default_targets)
    convert_(transformer)
    export_pipeline(folders["fp32"], transformer, scheme, folders["packed"], torch.bfloat16)
    return folders


def load(folder: Path, dtype: str) -> WanTransformer3DModel:
    """As a user does, packed or not."""
    return WanTransformer3DModel.from_pretrained(
        folder / "transformer", dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True
    ).eval()


def unfuse_(model: nn.Module) -> None:
    """Give fused blocks (qvgen/integrations/fused/wan.py) the forward and the attention of diffusers back."""
    for module in model.modules():
        if isinstance(module, WanTransformerBlock):
            vars(module).pop("forward", None)
        elif isinstance(module, WanAttention):
            module.set_processor(WanAttnProcessor())  # type: ignore[arg-type]  (annotated with another model's)


def inputs(model: str, tokens: int) -> dict[str, Tensor]:
    """What one denoising step gets: latents (1, 16, t, h, w) with `tokens` patches, timestep (1,), text (1, 512, d)."""
    config, generator = ARCHITECTURES[model], torch.Generator().manual_seed(0)
    grid = [n * patch for n, patch in zip(token_grid(tokens), config["patch_size"], strict=True)]
    return {
        "latents": torch.randn(1, config["in_channels"], *grid, generator=generator),
        "timestep": torch.tensor([500.0]),
        "text": torch.randn(1, TEXT_TOKENS, config["text_dim"], generator=generator),
    }


def token_grid(tokens: int) -> tuple[int, int, int]:
    """Frames, height and width in tokens: whole frames of 480 x 832 pixels, or one frame that is as square as can be."""
    height, width = FRAME
    if tokens % (height * width) == 0:
        return tokens // (height * width), height, width
    height = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
    return 1, height, tokens // height


def family_inputs(model: str, frames: int, device: torch.device) -> dict[str, Tensor]:
    """What one denoising step of a video of 480 x 832 pixels gets on a GPU: bfloat16, one sample."""
    family, config = ON_GPUS[model]
    generator, d, t = torch.Generator(device).manual_seed(0), config["in_channels"], (frames - 1) // 4 + 1
    wan = family is WanFamily
    latents = (1, d, t, 60, 104) if wan else (1, t, d, 60, 104)
    text = (1, TEXT_TOKENS if wan else config["max_text_seq_length"], config["text_dim" if wan else "text_embed_dim"])

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
