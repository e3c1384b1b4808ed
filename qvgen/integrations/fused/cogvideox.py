"""CogVideoX's transformer blocks for packed layers: the same computation in fewer passes over memory.

Text and video are two tensors with norms' modulations and gates of their own, and one sequence in the attention. diffusers'
block joins them before q, k and v and before the feed-forward, whose layers take each token by itself: here they are joined
once, for q, k and v, which share one reading. What each op does: kernels/block_ops.py and kernels/fused_ops.py. The norm of
each head of q and k is `layer_norm_modulate` of rows of a head. Outputs differ from diffusers' by rounding only
(tests/integration/test_fused_blocks.py states by how much).

Attention is replaced through diffusers' own processors, so that a processor or attention backend set later by the user wins;
which one runs else: attention.py.
"""

from __future__ import annotations

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
    reads_itself,
    replace_forward_,
    restore_forward_,
    shared,
)
from qvgen.kernels.block_ops import add_gated, layer_norm_modulate
from qvgen.kernels.fused_ops import Norm
from qvgen.nn.layers_together import added_feed_forward, added_linear, must_be_called
from qvgen.nn.packed_linear import PackedLinear


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
        if attention_mask is not None or needs_hooks(attn, cast(nn.Module, attn.norm_q)):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        tokens = encoder_hidden_states.shape[1]
        attended = self.attended(attn, torch.cat([encoder_hidden_states, hidden_states], dim=1), tokens, image_rotary_emb)
        projection, dropout = cast(nn.ModuleList, attn.to_out)
        attended = dropout(projection(attended))
        return attended[:, tokens:], attended[:, :tokens]

    def attended(self, attn: Any, x: Tensor, text_tokens: int, rotary_emb: tuple[Tensor, Tensor] | None) -> Tensor:
        """From text and video (n, s, d), normalized, to the input of the last projection."""
        query, key, value = (y.unflatten(-1, (attn.heads, -1)) for y in shared(x, [attn.to_q, attn.to_k, attn.to_v]))
        query, key = _normalized_heads(query, attn.norm_q), _normalized_heads(key, attn.norm_k)
        if rotary_emb is not None:
            for heads in (query, key):
                heads[:, text_tokens:] = _rotated(heads[:, text_tokens:], rotary_emb)
        if self._attention_backend is None:
            y = attend(query, key, value, self.compared)
        else:
            y = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        return y.flatten(2, 3).type_as(x)


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
    text, video = _added_attention(self.attn1, parts, image_rotary_emb, attention_kwargs or {})
    text, video = _added_feed_forward(self.ff, _parts(self.norm2, text, video, temb))
    return video, text


def _parts(norm: CogVideoXLayerNormZero, text: Tensor, video: Tensor, temb: Tensor) -> list[_Part]:
    """Text, then video: their order in the attention."""
    shift, scale, gate, *of_text = norm.linear(norm.silu(temb)).unsqueeze(1).chunk(6, dim=-1)
    text_shift, text_scale, text_gate = of_text
    text_part = _Part(text, norm_of(norm.norm, text_scale, text_shift), text_gate)
    return [text_part, _Part(video, norm_of(norm.norm, scale, shift), gate)]


def _added_attention(attn: Any, parts: list[_Part], rotary_emb: Any, attention_kwargs: dict[str, Any]) -> list[Tensor]:
    """x + gate * attn(norm(x)) of each part."""
    text, video = (layer_norm_modulate(part.x, *part.norm) for part in parts)
    if attention_kwargs or not reads_itself(attn, PackedCogVideoXAttnProcessor):
        video, text = attn(video, encoder_hidden_states=text, image_rotary_emb=rotary_emb, **attention_kwargs)
        return _added([text, video], parts)
    attended = attn.processor.attended(attn, torch.cat([text, video], dim=1), text.shape[1], rotary_emb)
    projection = attn.to_out[0]
    if _can_be_split(projection):
        pairs = zip(_split(attended, parts), parts, strict=True)
        return [added_linear(y, projection, part.x, part.gate) for y, part in pairs]
    return _added(_split(projection(attended), parts), parts)


def _added_feed_forward(ff: Any, parts: list[_Part]) -> list[Tensor]:
    """x + gate * ff(norm(x)) of each part."""
    packed = packed_feed_forward(ff)
    if packed is not None and all(map(_can_be_split, packed)):
        return [added_feed_forward(part.x, part.norm, *packed, part.gate) for part in parts]
    joined = torch.cat([layer_norm_modulate(part.x, *part.norm) for part in parts], dim=1)
    return _added(_split(ff(joined), parts), parts)


def _can_be_split(layer: nn.Module) -> bool:
    """Whether a layer may take text and video by themselves: nobody watches its calls."""
    return isinstance(layer, PackedLinear) and not must_be_called(layer)


def _split(y: Tensor, parts: list[_Part]) -> tuple[Tensor, ...]:
    return y.split([part.x.shape[1] for part in parts], dim=1)


def _added(ys: Any, parts: list[_Part]) -> list[Tensor]:
    return [add_gated(part.x, y, part.gate) for y, part in zip(ys, parts, strict=True)]


def _normalized_heads(x: Tensor, norm: Any) -> Tensor:
    """Layer norm of each head of x (n, s, heads, D)."""
    return layer_norm_modulate(x.flatten(1, 2), *norm_of(norm, None, None)).view(x.shape)


def _rotated(x: Tensor, rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
    """Pairs of features of x (n, s, heads, D), turned; cosines and sines (s, D) stand twice, once for each of a pair."""
    if torch.compiler.is_compiling():  # Inductor makes no code for complex numbers
        return apply_rotary_emb(x, rotary_emb, sequence_dim=1)  # type: ignore[return-value]  (annotated as a pair)
    cosine, sine = (table.to(x.device)[..., ::2].float().contiguous() for table in rotary_emb)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # 3 ms where PyTorch takes 21 in real numbers
    return torch.view_as_real(pairs * torch.complex(cosine, sine)[:, None]).flatten(-2).to(x.dtype)
