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

from qvgen.nn.packed_linear import PackedLinear, packed_layers

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
    """Let every LoraConfig made from now on know packed layers, and diffusers' loader of Flux. Idempotent."""
    _let_flux_load()
    original = peft.LoraConfig.__post_init__
    if getattr(original, "knows_packed_layers", False):
        return

    def with_packed_layers(self: Any) -> None:
        original(self)
        self._register_custom_module({PackedLinear: PackedLoraLinear})

    with_packed_layers.knows_packed_layers = True  # type: ignore[attr-defined]
    peft.LoraConfig.__post_init__ = with_packed_layers  # type: ignore[method-assign]


def _let_flux_load() -> None:
    """diffusers pads adapters of Flux whose layers read fewer features than the model's (control models), and looks for the
    weight of every layer to compare: packed ones have none, and none of them is padded."""
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    name = "_maybe_expand_lora_state_dict"
    original = getattr(FluxLoraLoaderMixin, name).__func__
    if getattr(original, "knows_packed_layers", False):
        return

    def expand(cls: Any, transformer: Any, lora_state_dict: dict[str, Any]) -> dict[str, Any]:
        names = [f"{cls.transformer_name}.{layer.removesuffix('.base_layer')}." for layer, _ in packed_layers(transformer)]
        packed = {key: value for key, value in lora_state_dict.items() if key.startswith(tuple(names))}
        others = {key: value for key, value in lora_state_dict.items() if key not in packed}
        return original(cls, transformer, others) | packed

    expand.knows_packed_layers = True  # type: ignore[attr-defined]
    setattr(FluxLoraLoaderMixin, name, classmethod(expand))
