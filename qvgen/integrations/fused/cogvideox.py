"""CogVideoX's transformer blocks for packed layers: the same computation in fewer passes over memory.

Text and video are one sequence for the layers and two for norms and gates, whose modulations differ. q, k and v share one
reading of their input, and the feed-forward keeps its wide intermediate in the cache (kernels/linear_ops.py); norms with what
modulates them and gates with residuals are an op each (kernels/block_ops.py), of text and video by themselves. The norm of
each head of q and k is that op, too, for rows of a head. Outputs differ from diffusers' by rounding only
(tests/integration/test_fused_blocks.py states by how much).

Attention is replaced through diffusers' own processors, so that a processor or attention backend set later by the user wins;
which one runs else: attention.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import CogVideoXLayerNormZero
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn

from qvgen.integrations.fused.attention import attend
from qvgen.integrations.fused.parts import (
    needs_hooks,
    norm_of,
    packed_feed_forward,
    replace_forward_,
    restore_forward_,
    shared,
)
from qvgen.kernels.block_ops import add_gated, layer_norm_modulate
from qvgen.kernels.fused_ops import Norm
from qvgen.nn.layers_together import feed_forward, is_spread, must_be_called


def fuse_cogvideox_(model: nn.Module) -> int:
    """Let every CogVideoX block of `model` that has packed layers run fused, in place. Returns how many do."""
    blocks = replace_forward_(model, CogVideoXBlock, _block_forward)
    for block in blocks:
        if type(block.attn1.processor) is CogVideoXAttnProcessor2_0 and isinstance(block.attn1.norm_q, nn.LayerNorm):
            block.attn1.set_processor(PackedCogVideoXAttnProcessor())
    return len(blocks)


def unfuse_cogvideox_(model: nn.Module) -> None:
    """Undo `fuse_cogvideox_`, for a model whose layers are packed no more; a processor set by the user stays."""
    restore_forward_(model, _block_forward)
    for module in model.modules():
        if isinstance(module, Attention) and type(module.processor) is PackedCogVideoXAttnProcessor:
            module.set_processor(cast(Any, CogVideoXAttnProcessor2_0()))  # declared as another


class PackedCogVideoXAttnProcessor(CogVideoXAttnProcessor2_0):
    """CogVideoXAttnProcessor2_0 without masks; layout (n, s, heads, D) from projection to projection."""

    _attention_backend = None  # diffusers' `set_attention_backend` sets it where there is one

    def __init__(self) -> None:
        super().__init__()
        self.compared: set[str] = set()  # attention.py

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        if attention_mask is not None or is_spread(attn):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        text_tokens = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = shared(x, [cast(nn.Module, layer) for layer in (attn.to_q, attn.to_k, attn.to_v)])
        query, key, value = (y.unflatten(-1, (attn.heads, -1)) for y in (query, key, value))
        query, key = _normalized_heads(query, attn.norm_q), _normalized_heads(key, attn.norm_k)
        if image_rotary_emb is not None:
            for y in (query, key):
                y[:, text_tokens:] = _rotated(y[:, text_tokens:], image_rotary_emb)
        if self._attention_backend is None:
            y = attend(query, key, value, self.compared)
        else:
            y = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        projection, dropout = cast(nn.ModuleList, attn.to_out)
        y = dropout(projection(y.flatten(2, 3).type_as(x)))
        return y[:, text_tokens:], y[:, :text_tokens]


class _Part(NamedTuple):
    """Tokens of the text or of the video before a layer, and what the timestep makes of them."""

    x: Tensor  # (n, s, d)
    norm: Norm
    gate: Tensor  # (n, 1, d)


def _block_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """CogVideoXBlock.forward."""
    if needs_hooks(self, self.norm1.norm):
        return CogVideoXBlock.forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs)
    parts = _parts(self.norm1, encoder_hidden_states, hidden_states, temb)
    text, video = (layer_norm_modulate(part.x, *part.norm) for part in parts)
    video, text = self.attn1(
        hidden_states=video, encoder_hidden_states=text, image_rotary_emb=image_rotary_emb, **(attention_kwargs or {})
    )
    text, video = _added(parts, [text, video])
    parts = _parts(self.norm2, text, video, temb)
    x = torch.cat([layer_norm_modulate(part.x, *part.norm) for part in parts], dim=1)
    packed = packed_feed_forward(self.ff)
    y = self.ff(x) if packed is None else feed_forward(x, *packed)
    text, video = _added(parts, y.split([part.x.shape[1] for part in parts], dim=1))
    return video, text


def _parts(norm: CogVideoXLayerNormZero, text: Tensor, video: Tensor, temb: Tensor) -> list[_Part]:
    """Text, then video: their order in the attention."""
    shift, scale, gate, *of_text = norm.linear(norm.silu(temb)).unsqueeze(1).chunk(6, dim=-1)
    text_shift, text_scale, text_gate = of_text
    text_part = _Part(text, norm_of(norm.norm, text_scale, text_shift), text_gate)
    return [text_part, _Part(video, norm_of(norm.norm, scale, shift), gate)]


def _added(parts: Sequence[_Part], ys: Sequence[Tensor]) -> list[Tensor]:
    """x + gate * y of each part."""
    return [add_gated(part.x, y, part.gate) for part, y in zip(parts, ys, strict=True)]


def _normalized_heads(x: Tensor, norm: Any) -> Tensor:
    """Layer norm of each head of x (n, s, heads, D)."""
    if must_be_called(norm):
        return norm(x)
    return layer_norm_modulate(x.flatten(1, 2), *norm_of(norm, None, None)).view(x.shape)


def _rotated(x: Tensor, rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
    """Pairs of features of x (n, s, heads, D), turned; cosines and sines (s, D) stand twice, once for each of a pair."""
    if torch.compiler.is_compiling():  # Inductor makes no code for complex numbers
        return apply_rotary_emb(x, rotary_emb, sequence_dim=1)  # type: ignore[return-value]  (annotated as a pair)
    cosine, sine = (table.to(x.device)[..., ::2].float().contiguous() for table in rotary_emb)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # 3 ms where PyTorch takes 21 in real numbers
    return torch.view_as_real(pairs * torch.complex(cosine, sine)[:, None]).flatten(-2).to(x.dtype)
