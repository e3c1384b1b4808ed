"""Both evaluations of a guided step as one batch, for transformers so small that their calls cost more than their products.

diffusers' WanPipeline calls its transformer twice a step: with the prompt's embeddings, then, on the same latents, with those
that guidance leads away from. Here the first call computes both and the second is answered from it. The pipeline is not
changed: a shallow copy of it runs, with a wrapper around the same transformer, which lives as long as one call of the copy. So
threads, errors and later calls never meet it.

An answer is given only to a call whose latents, timestep and embeddings are, by value, those that it was computed for.
Anything else is computed as it was asked. Pipelines that batch both themselves (CogVideoX) ask otherwise, and get what they
always got.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Latent tokens of one evaluation, of all its clips. Up to here one batch was faster at 128 and at 1536 channels; soon above it
# was slower in float32 (LOG.md, 2026-11-27). One bound for all precisions, so that models that are compared are sampled alike.
MOST_TOKENS = 384
_ASKED = {"hidden_states", "timestep", "encoder_hidden_states", "return_dict"}


def both_at_once(pipeline: Any, text: Tensor | None, negative: Tensor | None) -> Any:
    """What to call with these embeddings (n, l, d): a copy of the pipeline that computes both in one batch, or itself.

    Itself without guidance, for embeddings of two shapes, for a transformer whose configuration does not tell its tokens, and
    for one that others hook into: offloading moves it around each call, and caches keep apart what either call leaves behind.
    """
    transformer = pipeline.transformer
    if text is None or negative is None or text.shape != negative.shape:
        return pipeline
    if _patch(transformer) is None or _hooked(transformer):
        return pipeline
    twin = copy.copy(pipeline)
    caller = weakref.ref(twin)  # a cycle would keep the transformer when its memory is wanted
    # Past DiffusionPipeline.__setattr__, which writes to the configuration that both share.
    vars(twin)["transformer"] = _BothAtOnce(
        transformer, text, negative, lambda: getattr(caller(), "do_classifier_free_guidance", True)
    )
    return twin


class _Answer(NamedTuple):
    """What the transformer says to the second call, if that comes with these tensors."""

    latents: Tensor
    timestep: Tensor
    text: Tensor
    outputs: tuple[Tensor, ...]


class _BothAtOnce(nn.Module):
    """`transformer` for one call of a pipeline. Whatever else it is asked, the transformer answers."""

    def __init__(self, transformer: nn.Module, text: Tensor, negative: Tensor, guided: Callable[[], bool]) -> None:
        super().__init__()
        self.transformer, self._guided, self.training = transformer, guided, transformer.training
        # Copies, as all that an answer is compared with: nobody else can write to them.
        self._texts = torch.cat([text, negative])
        self._answer: _Answer | None = None
        self._gave_up = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("transformer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        answer, self._answer = self._answer, None
        others = [value for name, value in kwargs.items() if name not in _ASKED]
        if args or not kwargs.keys() >= _ASKED or kwargs["return_dict"] or any(value is not None for value in others):
            return self.transformer(*args, **kwargs)
        latents, timestep, text = kwargs["hidden_states"], kwargs["timestep"], kwargs["encoder_hidden_states"]
        if answer is not None:
            if _same(latents, answer.latents) and _same(timestep, answer.timestep) and _same(text, answer.text):
                return answer.outputs
            self._gave_up = True  # a second call that did not come once may never come: half of the work would be for nothing
        n = len(latents)
        wanted = not self._gave_up and self._guided() and self._pays(latents) and timestep.shape[:1] == (n,)
        if not wanted or not _same(text, self._texts[:n]) or len(self._texts) != 2 * n:
            return self.transformer(**kwargs)
        latents, timestep = (torch.cat([tensor, tensor]) for tensor in (latents, timestep))
        both = {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": self._texts}
        outputs = self.transformer(**kwargs | both)
        self._answer = _Answer(latents[n:], timestep[n:], self._texts[n:], tuple(output[n:] for output in outputs))
        return tuple(output[:n] for output in outputs)

    def _pays(self, latents: Tensor) -> bool:
        patch = _patch(self.transformer)
        if patch is None or latents.ndim != 2 + len(patch):
            return False
        return len(latents) * math.prod(latents.shape[2:]) <= MOST_TOKENS * math.prod(patch)


def _same(given: Tensor, kept: Tensor) -> bool:
    return given.dtype == kept.dtype and given.device == kept.device and torch.equal(given, kept)


def _patch(transformer: Any) -> Sequence[int] | None:
    """Latent frames, rows and columns that a token stands for, of transformers that say so."""
    patch = getattr(transformer, "config", {}).get("patch_size")
    return patch if isinstance(patch, tuple | list) else None


def _hooked(transformer: nn.Module) -> bool:
    """diffusers leaves an empty registry of hooks with every transformer that it called."""
    every = [vars(module) for module in transformer.modules()]
    return any("_hf_hook" in own or getattr(own.get("_diffusers_hook"), "hooks", None) for own in every)
