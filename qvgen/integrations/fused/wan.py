"""Wan's transformer blocks for packed layers: the same computation in fewer passes over memory.

diffusers' block normalizes, modulates, gates and rotates with some thirty elementary PyTorch operations, each a pass over
all tokens, most of them with a conversion to float32 or back. That hardly shows beside slow linear layers; beside packed
ones it does (`python -m bench.dit_step` shows how much). Here each of these is one op (kernels/block_ops.py), or part of the
packed layers' own (kernels/fused_ops.py): norms of those that read them, gates and residuals of those before them. q, k and v
share one reading of their input, and the feed-forward keeps its wide intermediate in the cache. Outputs differ from diffusers'
by rounding only (tests/integration/test_fused_blocks.py states by how much).

Attention is replaced through diffusers' own processors, so that a processor or attention backend set later by the user wins;
which one runs else: attention.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock
from torch import Tensor, nn

from qvgen.integrations.fused.attention import attend, preference
from qvgen.integrations.fused.parts import (
    needs_hooks,
    norm_of,
    packed_feed_forward,
    replace_forward_,
    restore_forward_,
    shared,
)
from qvgen.kernels.block_ops import add_gated, layer_norm_modulate, rms_norm_rotary
from qvgen.kernels.fused_ops import Norm
from qvgen.kernels.whole_block import Attention, RmsNorm, Step
from qvgen.nn.layers_together import (
    added_feed_forward,
    added_linear,
    in_one_call,
    must_be_called,
    normalized_linears,
)
from qvgen.nn.packed_linear import PackedLinear


def fuse_wan_(model: nn.Module) -> int:
    """Let every Wan block of `model` that has packed layers run fused, in place. Returns how many do."""
    blocks = replace_forward_(model, WanTransformerBlock, _block_forward)
    for block in blocks:
        for attn in (block.attn1, block.attn2):
            if type(attn.processor) is WanAttnProcessor and attn.add_k_proj is None:
                attn.set_processor(cast(Any, PackedWanAttnProcessor()))  # declared as a union of diffusers' own
    return len(blocks)


def unfuse_wan_(model: nn.Module) -> None:
    """Undo `fuse_wan_`, for a model whose layers are packed no more; a backend or processor set by the user stays."""
    restore_forward_(model, _block_forward)
    for module in model.modules():
        if isinstance(module, WanAttention) and type(module.processor) is PackedWanAttnProcessor:
            plain = WanAttnProcessor()
            vars(plain).update({name: value for name, value in vars(module.processor).items() if name != "compared"})
            module.set_processor(cast(Any, plain))


class PackedWanAttnProcessor(WanAttnProcessor):
    """WanAttnProcessor without image conditioning and masks; layout (n, s, heads, D) from projection to projection."""

    def __init__(self) -> None:
        super().__init__()
        self.compared: set[str] = set()  # attention.py

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if attention_mask is not None or needs_hooks(attn, attn.norm_q):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if encoder_hidden_states is None:
            query, key, value = shared(hidden_states, [attn.to_q, attn.to_k, attn.to_v])
        else:
            query = attn.to_q(hidden_states)
            key, value = shared(encoder_hidden_states, [attn.to_k, attn.to_v])
        hidden_states = self._attend(attn, query, key, value, encoder_hidden_states is None, rotary_emb)
        projection, dropout = attn.to_out
        hidden_states = projection(hidden_states)
        return dropout(hidden_states) if dropout.training else hidden_states

    def added(
        self, attn: WanAttention, x: Tensor, norm: Norm | None, text: Tensor | None, rotary_emb: Any, gate: Tensor | None
    ) -> Tensor:
        """x + gate * attn(norm(x)), for an attention that `_reads_itself`."""
        if text is None:
            query, key, value = _normalized(x, norm, [attn.to_q, attn.to_k, attn.to_v])
        else:
            (query,) = _normalized(x, norm, [attn.to_q])
            key, value = shared(text, [attn.to_k, attn.to_v])
        attended = self._attend(attn, query, key, value, text is None, rotary_emb)
        projection = attn.to_out[0]
        if isinstance(projection, PackedLinear):
            return added_linear(attended, projection, x, gate)
        return add_gated(x, projection(attended), gate)

    def _attend(
        self, attn: WanAttention, query: Tensor, key: Tensor, value: Tensor, to_itself: bool, rotary_emb: Any
    ) -> Tensor:
        """From projections to the input of the last one, (n, s, d)."""
        cosine, sine = (None, None) if rotary_emb is None else rotary_emb
        query = rms_norm_rotary(query, attn.norm_q.weight, cosine, sine, attn.heads, _eps(attn.norm_q, query))
        key = rms_norm_rotary(key, attn.norm_k.weight, cosine, sine, attn.heads, _eps(attn.norm_k, key))
        query, key, value = (t.view(*t.shape[:2], attn.heads, -1) for t in (query, key, value))
        if self._attention_backend is None and self._parallel_config is None:
            hidden_states = attend(query, key, value, self.compared)
        else:
            parallel = self._parallel_config if to_itself else None
            hidden_states = dispatch_attention_fn(query, key, value, backend=self._attention_backend, parallel_config=parallel)
        return hidden_states.flatten(2, 3).type_as(query)


def _block_forward(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
) -> Tensor:
    """WanTransformerBlock.forward; temb (n, 6, d), or (n, s, 6, d) with a timestep per token (Wan 2.2 5B)."""
    if needs_hooks(self, self.attn1.norm_q):
        return WanTransformerBlock.forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb)  # type: ignore[arg-type]
    table = self.scale_shift_table if temb.ndim == 3 else self.scale_shift_table.unsqueeze(0)
    modulation = (table + temb.float()).chunk(6, dim=-2)
    if temb.ndim == 4:
        modulation = [m.squeeze(2) for m in modulation]
    shift_msa, scale_msa, gate_msa, c_shift_msa, c_scale_msa, c_gate_msa = modulation

    x, text = hidden_states, encoder_hidden_states
    norms = (
        norm_of(self.norm1, scale_msa, shift_msa),
        None if isinstance(self.norm2, nn.Identity) else norm_of(self.norm2, None, None),
        norm_of(self.norm3, c_scale_msa, c_shift_msa),
    )
    if (y := _in_one_call(self, x, text, rotary_emb, norms, (gate_msa, None, c_gate_msa))) is not None:
        return y
    x = _added_attention(self.attn1, x, norms[0], None, rotary_emb, gate_msa)
    x = _added_attention(self.attn2, x, norms[1], text, None, None)
    return _added_feed_forward(self.ffn, x, norms[2], c_gate_msa)


def _in_one_call(
    block: Any, x: Tensor, text: Tensor, rotary_emb: Any, norms: Sequence[Norm | None], gates: Sequence[Tensor | None]
) -> Tensor | None:
    """The block's output where its three steps can be one call; None where they are to be taken one by one."""
    attentions, ffn = (block.attn1, block.attn2), packed_feed_forward(block.ffn)
    if ffn is None or must_be_called(block.ffn):
        return None
    steps, layers = [], []
    for attn, inputs in zip(attentions, ((None, *(rotary_emb or (None, None))), (text, None, None)), strict=True):
        own = attn.processor
        of_attention = attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]
        if not _reads_itself(attn) or own._attention_backend is not None or own._parallel_config is not None:
            return None
        if not all(isinstance(layer, PackedLinear) for layer in of_attention):
            return None
        query_norm, key_norm = (RmsNorm(norm.weight, _eps(norm, x)) for norm in (attn.norm_q, attn.norm_k))
        steps.append(Attention(attn.heads, query_norm, key_norm, inputs[1], inputs[2], inputs[0]))
        layers.append(of_attention)
    if preference() != "auto":
        return None
    return in_one_call(x, list(map(Step, norms, (*steps, None), gates)), [*layers, ffn])


def _added_attention(
    attn: WanAttention, x: Tensor, norm: Norm | None, text: Tensor | None, rotary_emb: Any, gate: Tensor | None
) -> Tensor:
    """x + gate * attn(norm(x))."""
    if _reads_itself(attn):
        return attn.processor.added(attn, x, norm, text, rotary_emb, gate)  # type: ignore[union-attr]
    attended = attn(x if norm is None else layer_norm_modulate(x, *norm), text, None, rotary_emb)
    return add_gated(x, attended, gate)


def _reads_itself(attn: WanAttention) -> bool:
    """Whether nothing stands between the block and the attention's layers: no processor or hook but ours, and no dropout."""
    if type(attn.processor) is not PackedWanAttnProcessor or must_be_called(attn) or needs_hooks(attn, attn.norm_q):
        return False
    replaced = "forward" in attn.__dict__ and "_hf_hook" not in attn.__dict__  # accelerate's, which moves inputs only
    return not replaced and not (attn.to_out[1].training and attn.to_out[1].p)


def _added_feed_forward(ffn: FeedForward, x: Tensor, norm: Norm, gate: Tensor | None) -> Tensor:
    """x + gate * ffn(norm(x))."""
    if (packed := packed_feed_forward(ffn)) is not None:
        return added_feed_forward(x, norm, *packed, gate)
    return add_gated(x, ffn(layer_norm_modulate(x, *norm)), gate)


def _normalized(x: Tensor, norm: Norm | None, layers: Sequence[nn.Module]) -> list[Tensor]:
    """Outputs of layers that read the same norm."""
    packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
    if norm is not None and len(packed) == len(layers):
        return normalized_linears(x, norm, packed)
    return shared(x if norm is None else layer_norm_modulate(x, *norm), layers)


def _eps(norm: nn.RMSNorm, x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
