"""Two-layer models of both families with random weights, and whole diffusers pipelines around them.

Everything is real but small: tests run the same code on them as on the published models, in a second. Same seed, same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qvgen.models.family import ClipSize

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel

TINY_CLIP = ClipSize(frames=9, height=32, width=32, max_sequence_length=8)  # latents: 3 frames of 4 x 4
TINY_PROMPT = "a red digit three moving up"
_LATENT_CHANNELS, _TEXT_DIM = 4, 16
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


def tiny_wan_transformer(seed: int = 0) -> WanTransformer3DModel:
    """Wan: 2 layers, 2 heads of 12, in evaluation mode. Latents (n, 4, t, h, w), text (n, l, 16)."""
    from diffusers import WanTransformer3DModel

    with _seeded(seed):
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=_LATENT_CHANNELS,
            out_channels=_LATENT_CHANNELS,
            text_dim=_TEXT_DIM,
            freq_dim=16,
            ffn_dim=40,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ).eval()


def tiny_cogvideox_transformer(rotary: bool = False, seed: int = 0) -> CogVideoXTransformer3DModel:
    """CogVideoX: 2 layers, 2 heads of 16, in evaluation mode. `rotary` as in 5B, without as in 2B. Latents (n, t, 4, h, w)
    with t = 3 and h = w = 4, text (n, 8, 16)."""
    from diffusers import CogVideoXTransformer3DModel

    with _seeded(seed):
        return CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=_LATENT_CHANNELS,
            out_channels=_LATENT_CHANNELS,
            time_embed_dim=12,
            text_embed_dim=_TEXT_DIM,
            num_layers=2,
            sample_width=TINY_CLIP.width // 8,
            sample_height=TINY_CLIP.height // 8,
            sample_frames=TINY_CLIP.frames,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=TINY_CLIP.max_sequence_length,
            use_rotary_positional_embeddings=rotary,
        ).eval()


def tiny_pipeline(family_name: str, folder: str | Path, *, rotary: bool = False, seed: int = 0) -> Path:
    """Write a whole pipeline of family "wan" or "cogvideox" to `folder` and return it. Clips of TINY_CLIP; prompts are made
    of the words of TINY_PROMPT, other colours, digits and directions."""
    builders = {"wan": _wan_pipeline, "cogvideox": lambda seed: _cogvideox_pipeline(rotary, seed)}
    if family_name not in builders:
        raise ValueError(f"family {family_name!r} is not one of {', '.join(builders)}")
    builders[family_name](seed).save_pretrained(folder)
    return Path(folder)


def _wan_pipeline(seed: int) -> Any:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = _tokenizer()
    with _seeded(seed):
        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=_LATENT_CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * _LATENT_CHANNELS,
            latents_std=[1.0] * _LATENT_CHANNELS,
        )
        text_encoder = UMT5EncoderModel(UMT5Config(**_t5_sizes(tokenizer))).eval()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_wan_transformer(seed),
    )


def _cogvideox_pipeline(rotary: bool, seed: int) -> Any:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline
    from transformers import T5Config, T5EncoderModel

    tokenizer = _tokenizer()
    with _seeded(seed):
        vae = AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),  # type: ignore[arg-type]  (annotated as one number)
            latent_channels=_LATENT_CHANNELS,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
            sample_height=TINY_CLIP.height,
            sample_width=TINY_CLIP.width,
        )
        text_encoder = T5EncoderModel(T5Config(**_t5_sizes(tokenizer))).eval()
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae.eval(),
        # The published models' settings.
        scheduler=CogVideoXDDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
        ),
        transformer=tiny_cogvideox_transformer(rotary, seed),
    )


def _tokenizer() -> Any:
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


def _t5_sizes(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "d_model": _TEXT_DIM,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
        "dropout_rate": 0.0,
    }


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the CPU generator inside, and leaves the caller's as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
