"""LoRA on packed models, through peft's own mechanism for layers that it does not know.

An adapter reads the same input as its packed layer and adds a product in 16 or 32 bits, y = packed(x) + scaling up(down(x)).
Loading, several adapters with weights, switching and unloading are diffusers' and peft's. Training an adapter on the frozen
packed model works too: gradients pass through packed layers (kernels/gradient.py). Merging cannot work: a packed weight has no
room for the sum.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import peft
from peft.tuners import lora

from qvgen.nn.packed_linear import PackedLinear

_NO_MERGING = (
    "LoRA weights cannot be merged into packed ones (fuse_lora, merge): leave them loaded as adapters, or fuse them into the "
    "full-precision pipeline before packing: `qvgen fuse` or `qvgen pack`, --lora FILE@SCALE"
)


class PackedLoraLinear(lora.Linear):
    """peft's LoRA layer around a PackedLinear."""

    def __init__(self, base_layer: Any, adapter_name: str, **options: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Unsupported layer type"
            )  # peft's word for every layer that is registered
            super().__init__(base_layer, adapter_name, **options)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ValueError: see the module's text."""
        raise ValueError(_NO_MERGING)


def refuse_merging_(model: Any) -> None:
    """Let `model.fuse_lora` refuse before it scales or merges anything: diffusers' goes from layer to layer, and would leave
    those that are not packed merged."""
    model.fuse_lora = partial(_fuse, model)


def _fuse(model: Any, *args: Any, **options: Any) -> None:
    if any(isinstance(module, PackedLoraLinear) for module in model.modules()):
        raise ValueError(_NO_MERGING)
    type(model).fuse_lora(model, *args, **options)


def register() -> None:
    """Let every LoraConfig made from now on know packed layers. Idempotent."""
    original = peft.LoraConfig.__post_init__
    if getattr(original, "knows_packed_layers", False):
        return

    def with_packed_layers(self: Any) -> None:
        original(self)
        self._register_custom_module({PackedLinear: PackedLoraLinear})

    with_packed_layers.knows_packed_layers = True  # type: ignore[attr-defined]
    peft.LoraConfig.__post_init__ = with_packed_layers  # type: ignore[method-assign]
