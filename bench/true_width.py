"""Pipeline folders in the published format and at the published width, with few layers and random weights.

Every field of the transformer's and the VAE's config is the published one, but for the number of layers. The text encoder is
as wide as the published one, with one thin layer and 64,000 words: what the embeddings of a published one weigh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvgen.models.cogvideox import COGVIDEOX_2B, CogVideoXFamily
from qvgen.models.family import Family
from qvgen.models.wan import WAN_2_1_1_3B, WanFamily

WORDS = 64_000


@dataclass(frozen=True)
class Published:
    """`vae`: the published config where it differs from the defaults of diffusers; `pipeline`: entries of model_index.json."""

    family: type[Family]
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any] = field(default_factory=dict)
    pipeline: Mapping[str, Any] = field(default_factory=dict)


_WAN_2_2_VAE: Mapping[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "is_residual": True,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,  # the published statistics would change numbers, not bytes
    "latents_std": [1.0] * 48,
}
_COGVIDEOX_VAE: Mapping[str, Any] = {
    "block_out_channels": [128, 256, 256, 512],
    "latent_channels": 16,
    "layers_per_block": 3,
    "sample_height": 480,
    "sample_width": 720,
}
_WAN_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
_WAN_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
_COGVIDEOX_1_5 = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "sample_width": 300,
    "sample_height": 300,
    "sample_frames": 81,
    "patch_size_t": 2,
    "patch_bias": False,
    "use_rotary_positional_embeddings": True,
}
PUBLISHED: dict[str, Published] = {
    "wan2.1-1.3b": Published(WanFamily, WAN_2_1_1_3B),
    "wan2.1-14b": Published(WanFamily, WAN_2_1_1_3B | _WAN_14B),
    "wan2.2-ti2v-5b": Published(WanFamily, WAN_2_1_1_3B | _WAN_5B, _WAN_2_2_VAE, {"expand_timesteps": True}),
    "cogvideox-2b": Published(CogVideoXFamily, COGVIDEOX_2B, _COGVIDEOX_VAE),
    "cogvideox1.5-5b": Published(CogVideoXFamily, {**COGVIDEOX_2B, **_COGVIDEOX_1_5}, _COGVIDEOX_VAE),
}


def write_model(folder: Path, name: str, layers: int) -> dict[str, float]:
    """The folder of one of PUBLISHED: transformer and text encoder in bfloat16, VAE in float32. Returns the bytes that the
    stages hold, P of the transformer in float32, T and V of text encoder and VAE as they are stored."""
    import torch

    published = PUBLISHED[name]
    torch.manual_seed(0)
    pipeline = published.family.tiny_pipeline()
    pipeline.tokenizer.model_max_length = 512
    sizes: dict[str, Any] = {"vocab_size": WORDS, "d_model": 4096, "d_kv": 64, "d_ff": 64, "num_layers": 1, "num_heads": 1}
    encoder, vae = pipeline.text_encoder, pipeline.vae
    torch.set_default_dtype(torch.bfloat16)  # never a float32 copy of a large model
    parts: dict[str, Any] = {
        "transformer": published.family.transformer({**published.transformer, "num_layers": layers}),
        "text_encoder": type(encoder)(type(encoder.config)(**sizes)),
    }
    torch.set_default_dtype(torch.float32)
    parts["vae"] = type(vae)(**published.vae)
    pipeline.register_modules(**parts)
    pipeline.register_to_config(**published.pipeline)
    pipeline.save_pretrained(folder, max_shard_size="2GB")
    count = {part: sum(p.numel() for p in parts[part].parameters()) for part in parts}
    return {"P": 4.0 * count["transformer"], "T": 2.0 * count["text_encoder"], "V": 4.0 * count["vae"]}
