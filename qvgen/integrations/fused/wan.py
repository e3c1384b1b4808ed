"""Wan's transformer blocks for packed layers: the same computation in fewer passes over memory.

diffusers' block normalizes, modulates, gates and rotates with some thirty elementary PyTorch operations, each a pass over
all tokens, most of them with a conversion to float32 or back. That hardly shows beside slow linear layers; beside packed
ones it does (`python -m bench.dit_step` shows how much). Here each of these is one op (kernels/block_ops.py), q, k
and v share one reading of their input, and the feed-forward keeps its wide intermediate in the cache. Outputs differ from
diffusers' by rounding only (tests/integration/test_fused_wan.py states by how much).

Attention is replaced through diffusers' own processors, so that a processor or attention backend set later by the user wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock
from torch import Tensor, nn

from qvgen.kernels.block_ops import add_gated, attention, layer_norm_modulate, rms_norm_rotary
from qvgen.nn.layers_together import brought_for_each_call, feed_forward, linears
from qvgen.nn.packed_linear import PackedLinear


def fuse_wan_(model: nn.Module) -> int:
    """Let every Wan block of `model` that has packed layers run fused, in place. Returns how many do."""
    blocks = [block for block in model.modules() if type(block) is WanTransformerBlock and _has_packed_layers(block)]
    for block in blocks:
        # Not a bound method: pickle would look for the function's name in the block.
        cast(Any, block).forward = partial(_block_forward, block)
        for attn in (block.attn1, block.attn2):
            if type(attn.processor) is WanAttnProcessor and attn.add_k_proj is None:
                attn.set_processor(cast(Any, PackedWanAttnProcessor()))  # declared as a union of diffusers' own
    return len(blocks)


def unfuse_wan_(model: nn.Module) -> None:
    """Undo `fuse_wan_`, for a model whose layers are packed no more; a backend or processor set by the user stays."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, partial) and forward.func is _block_forward:
            del module.__dict__["forward"]
        if isinstance(module, WanAttention) and type(module.processor) is PackedWanAttnProcessor:
            plain = WanAttnProcessor()
            vars(plain).update(vars(module.processor))
            module.set_processor(cast(Any, plain))


def _has_packed_layers(block: nn.Module) -> bool:
    return any(isinstance(module, PackedLinear) for module in block.modules())


class PackedWanAttnProcessor(WanAttnProcessor):
    """WanAttnProcessor without image conditioning and masks; layout (n, s, heads, D) from projection to projection."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if attention_mask is not None or brought_for_each_call(attn.norm_q):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if encoder_hidden_states is None:
            query, key, value = _shared(hidden_states, [attn.to_q, attn.to_k, attn.to_v])
        else:
            query = attn.to_q(hidden_states)
            key, value = _shared(encoder_hidden_states, [attn.to_k, attn.to_v])
        cosine, sine = (None, None) if rotary_emb is None else rotary_emb
        query = rms_norm_rotary(query, attn.norm_q.weight, cosine, sine, attn.heads, _eps(attn.norm_q, query))
        key = rms_norm_rotary(key, attn.norm_k.weight, cosine, sine, attn.heads, _eps(attn.norm_k, key))
        query, key, value = (t.view(*t.shape[:2], attn.heads, -1) for t in (query, key, value))
        if self._attention_backend is None and self._parallel_config is None:
            hidden_states = attention(query, key, value)
        else:
            parallel = self._parallel_config if encoder_hidden_states is None else None
            hidden_states = dispatch_attention_fn(query, key, value, backend=self._attention_backend, parallel_config=parallel)
        hidden_states = hidden_states.flatten(2, 3).type_as(query)
        projection, dropout = attn.to_out
        hidden_states = projection(hidden_states)
        return dropout(hidden_states) if dropout.training else hidden_states


def _block_forward(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
) -> Tensor:
    """WanTransformerBlock.forward; temb (n, 6, d), or (n, s, 6, d) with a timestep per token (Wan 2.2 5B)."""
    if brought_for_each_call(self.attn1.norm_q):
        return WanTransformerBlock.forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb)  # type: ignore[arg-type]
    table = self.scale_shift_table if temb.ndim == 3 else self.scale_shift_table.unsqueeze(0)
    modulation = (table + temb.float()).chunk(6, dim=-2)
    if temb.ndim == 4:
        modulation = [m.squeeze(2) for m in modulation]
    shift_msa, scale_msa, gate_msa, c_shift_msa, c_scale_msa, c_gate_msa = modulation

    x = layer_norm_modulate(hidden_states, self.norm1.weight, self.norm1.bias, scale_msa, shift_msa, self.norm1.eps)
    hidden_states = add_gated(hidden_states, self.attn1(x, None, None, rotary_emb), gate_msa)

    x = hidden_states
    if not isinstance(self.norm2, nn.Identity):
        x = layer_norm_modulate(x, self.norm2.weight, self.norm2.bias, None, None, self.norm2.eps)
    hidden_states = add_gated(hidden_states, self.attn2(x, encoder_hidden_states, None, None), None)

    x = layer_norm_modulate(hidden_states, self.norm3.weight, self.norm3.bias, c_scale_msa, c_shift_msa, self.norm3.eps)
    return add_gated(hidden_states, _feed_forward(self.ffn, x), c_gate_msa)


def _feed_forward(ffn: FeedForward, x: Tensor) -> Tensor:
    activation, down = ffn.net[0], ffn.net[-1]
    if len(ffn.net) == 3 and isinstance(activation, GELU) and activation.approximate == "tanh":
        up = activation.proj
        if isinstance(up, PackedLinear) and isinstance(down, PackedLinear):
            return feed_forward(x, up, down)
    return ffn(x)


def _shared(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """Outputs of layers that read the same input."""
    packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
    return linears(x, packed) if len(packed) == len(layers) else [layer(x) for layer in layers]


def _eps(norm: nn.RMSNorm, x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
