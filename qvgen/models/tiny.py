"""Parts that the two-layer models of all families share: clips, words, sizes of a text encoder. Each model stands in its
family's file.

Everything is real but small: tests run the same code on them as on the published models, in a second. Same seed, same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qvgen.models.family import ClipSize

TINY_CLIP = ClipSize(frames=9, height=32, width=32, max_sequence_length=8)  # latents: 3 frames of 4 x 4
TINY_IMAGE = replace(TINY_CLIP, frames=1)
TINY_PROMPT = "a red digit three moving up"
LATENT_CHANNELS, TEXT_DIM, POOLED_DIM = 4, 16, 8
_WORDS = [
    "a",
    "blue",
    "digit",
    "down",
    "five",
    "four",
    "green",
    "left",
    "moving",
    "one",
    "red",
    "right",
    "three",
    "two",
    "up",
    "zero",
]


def tiny_pipeline(family_name: str, folder: str | Path, *, seed: int = 0, **options: bool) -> Path:
    """Write a whole pipeline of a family ("wan", "cogvideox") to `folder` and return it. Clips of TINY_CLIP; prompts are made
    of the words of TINY_PROMPT, other colours, digits and directions. `options`: the family's own."""
    from qvgen.models.registry import families

    known = families()
    if family_name not in known:
        raise ValueError(f"family {family_name!r} is not one of {', '.join(known)}")
    wanted = {name: True for name, asked in options.items() if asked}
    known[family_name].tiny_pipeline(seed, **wanted).save_pretrained(folder)
    return Path(folder)


def word_tokenizer() -> Any:
    """One token a word, so that no vocabulary file is needed."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TINY_CLIP.max_sequence_length,
    )


def t5_sizes(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "d_model": TEXT_DIM,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
        "dropout_rate": 0.0,
    }


def clip_encoder(tokenizer: Any, positions: int = TINY_CLIP.max_sequence_length, projected: bool = False) -> Any:
    """CLIP's text encoder, pooled embeddings (n, POOLED_DIM), for that many tokens; `projected`: as the encoders of
    Stable Diffusion give them."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=POOLED_DIM,
        projection_dim=POOLED_DIM,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=positions,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def image_vae(**options: Any) -> Any:
    """A VAE of images whose latents have an eighth of the rows and columns."""
    from diffusers import AutoencoderKL

    sizes: dict[str, Any] = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 2}
    sizes |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(latent_channels=LATENT_CHANNELS, **sizes, **options).eval()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the CPU generator inside, and leaves the caller's as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
