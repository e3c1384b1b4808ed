"""Which attention fused blocks call: the environment variable QVGEN_ATTENTION.

    auto    the attention op (kernels/block_ops.py): compiled on CPUs where that is faster, else PyTorch's SDPA
    sdpa    PyTorch's SDPA
    flash   flash-attn, version 3 where it is installed
    sage    SageAttention, which multiplies q and k in 8 bits
    int8    our own op that does so, attention_int8, in Triton; on CPUs PyTorch computes it, to see what becomes of videos

flash and sage run through diffusers' dispatcher. Each attention layer compares the first result of flash, sage or int8 with
SDPA's of the same q, k and v, and refuses to go on if it is further away than the bound below: what is asked for by name never
falls back. A backend set by diffusers' `set_attention_backend` wins, and is compared with nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from qvgen.kernels import expressions
from qvgen.kernels.block_ops import attention, attention_int8
from qvgen.kernels.triton.attention import launch
from qvgen.kernels.triton.backend import missing

ENVIRONMENT = "QVGEN_ATTENTION"
_log = logging.getLogger(__name__)
_DTYPES = (torch.bfloat16, torch.float16)


class Library(NamedTuple):
    backends: tuple[str, ...]  # diffusers' names of it, best first; none: our own op
    bound: float  # of |y - SDPA's y| / |SDPA's y|, over all of a call's values
    install: str
    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = _DTYPES


# Rounding normal values to bfloat16 alone is 0.17 %. flash sums the same products in another order, sage and int8 multiply
# 8 bits.
LIBRARIES = {
    "flash": Library(("_flash_3", "flash"), 0.01, "pip install flash-attn"),
    "sage": Library(("sage",), 0.05, "pip install sageattention"),
    "int8": Library((), 0.05, "pip install qvgen[triton]", ("cuda", "cpu"), (*_DTYPES, torch.float32)),
}
NAMES = ("auto", "sdpa", *LIBRARIES)


def preference() -> str:
    """What QVGEN_ATTENTION asks for; auto if it is not set. Raises ValueError for an unknown name."""
    value = os.environ.get(ENVIRONMENT) or "auto"
    if value not in NAMES:
        raise ValueError(f"{ENVIRONMENT}={value!r} is not one of {', '.join(NAMES)}")
    return value


def attend(q: Tensor, k: Tensor, v: Tensor, compared: set[str]) -> Tensor:
    """Attention of q (n, s, heads, D) and k, v (n, t, heads, D), in the dtype of q. `compared` belongs to the layer: names of
    libraries whose first result there was near enough.

    Raises RuntimeError where the library that was asked for is not installed, cannot take these tensors, or is too far away.
    """
    name = preference()
    if name == "auto" or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return attention(q, k, v)
    if name == "sdpa":
        return expressions.attention(q, k, v)
    library = LIBRARIES[name]
    if q.device.type not in library.devices or q.dtype not in library.dtypes:
        takes = " or ".join(str(dtype).removeprefix("torch.") for dtype in library.dtypes)
        raise RuntimeError(
            f"{ENVIRONMENT}={name} takes {takes} on {' or '.join(library.devices)}, not {q.dtype} on {q.device}: load the "
            f"model with dtype=torch.bfloat16 on a GPU, or unset {ENVIRONMENT}"
        )
    own = q.is_cuda and not library.backends and not torch.compiler.is_compiling()
    if own and (reason := missing(q.device) or launch.refusal(q)):
        raise RuntimeError(f"{ENVIRONMENT}={name} cannot run: {reason}; unset {ENVIRONMENT}")
    run = _function(name)
    if name in compared:
        return run(q, k, v)
    if torch.compiler.is_compiling() or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        raise RuntimeError(
            f"{ENVIRONMENT}={name}: call the model once before it is compiled or recorded, to compare with SDPA"
        )
    y = run(q, k, v)
    error = relative_error(y, expressions.attention(q, k, v))
    if not error <= library.bound:  # NaN is too far, too
        raise RuntimeError(
            f"{ENVIRONMENT}={name}: its result is {error:.3g} of SDPA's norm away from it, at most {library.bound:g} is "
            f"allowed; unset {ENVIRONMENT} for SDPA itself"
        )
    _log.info("%s=%s: %.3g of SDPA's norm away from it in the first call of a layer", ENVIRONMENT, name, error)
    compared.add(name)
    return y


def _function(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return partial(dispatch_attention_fn, backend=usable(name)) if LIBRARIES[name].backends else attention_int8


def usable(name: str) -> AttentionBackendName:
    """diffusers' backend for a library. Raises RuntimeError, with what to install, if none is there."""
    library, refusals = LIBRARIES[name], []
    for backend in map(AttentionBackendName, library.backends):
        try:
            attention_dispatch._check_attention_backend_requirements(backend)
            return backend
        except RuntimeError as error:
            refusals.append(str(error))
    raise RuntimeError(f"{ENVIRONMENT}={name} cannot run: {' '.join(refusals)} (`{library.install}`, or unset {ENVIRONMENT})")


def relative_error(y: Tensor, expected: Tensor) -> float:
    """|y - expected| / |expected|, in float32."""
    expected = expected.float()
    return float((y.float() - expected).norm() / expected.norm())
