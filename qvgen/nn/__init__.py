"""Quantized linear layers: the one that is trained, the one that is packed, and what puts them into a model.

    names = prepare_(model, scheme, default_targets=family.default_targets)   # nn.Linear -> QATLinear
    ...                                                                       # train
    convert_(model)                                                           # QATLinear -> PackedLinear

Both kinds need the timestep of the call, which the model's forward tells them. What runs a layer outside that forward says it
itself:

    set_timestep(torch.tensor([999.0]))
    layer(x)                                              # x (samples, ..., K) -> (samples, ..., N)

Names are imported when they are first used: importing this package loads no PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvgen.lazy import lazy

if TYPE_CHECKING:
    from qvgen.nn.packed_linear import PackedLinear, packed_layers
    from qvgen.nn.qat_linear import QATLinear
    from qvgen.nn.swap import add_phi_, convert_, prepare_, qat_layers, set_phi_
    from qvgen.nn.targets import match_linears, replace_module
    from qvgen.nn.timestep import carry_timestep, set_timestep, track_timestep

__all__ = [
    "PackedLinear",
    "QATLinear",
    "add_phi_",
    "carry_timestep",
    "convert_",
    "match_linears",
    "packed_layers",
    "prepare_",
    "qat_layers",
    "replace_module",
    "set_phi_",
    "set_timestep",
    "track_timestep",
]

__getattr__ = lazy(
    {
        **dict.fromkeys(("PackedLinear", "packed_layers"), "qvgen.nn.packed_linear"),
        "QATLinear": "qvgen.nn.qat_linear",
        **dict.fromkeys(("add_phi_", "convert_", "prepare_", "qat_layers", "set_phi_"), "qvgen.nn.swap"),
        **dict.fromkeys(("match_linears", "replace_module"), "qvgen.nn.targets"),
        **dict.fromkeys(("carry_timestep", "set_timestep", "track_timestep"), "qvgen.nn.timestep"),
    }
)
