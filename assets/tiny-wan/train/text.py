"""Make the embedded text side: a word-level tokenizer, a small frozen random UMT5 encoder, the sampler's scheduler.

The encoder is not trained: random features of 23 words are told apart as well as learned ones, and the transformer
learns what they mean. Writes ../tokenizer, ../text_encoder, ../scheduler. Takes seconds; seeded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from qvgen.data.digits import ALL_ATTRIBUTES

HERE = Path(__file__).resolve().parents[1]
MAX_LENGTH = 12


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for a in ALL_ATTRIBUTES for word in a.caption.split()})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_LENGTH,
    )


def build_text_encoder(vocabulary_size: int) -> UMT5EncoderModel:
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=vocabulary_size, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0)
    return UMT5EncoderModel(config).eval()


def main() -> None:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(HERE / "tokenizer")
    build_text_encoder(len(tokenizer)).save_pretrained(HERE / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(HERE / "scheduler")


if __name__ == "__main__":
    main()
