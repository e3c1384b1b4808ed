"""The packed format: a few bits per weight in memory and in files (docs/packed-format.md).

    words = pack(codes, num_bits=4)                       # codes (N, K) uint8 -> words (N, ceil(4 K / 32)) int32
    unpack(words, num_bits=4, in_features=K)              # the codes again
    layer_layout(K, N, scheme, has_bias=True)             # name -> shape and dtype of each tensor of a packed layer
    config["quantization_config"] = to_config(scheme, num_targets=40)    # what config.json says of it

Names are imported when they are first used: importing this package loads no PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvgen.lazy import lazy

if TYPE_CHECKING:
    from qvgen.packing.bits import pack, unpack
    from qvgen.packing.config import FORMAT_VERSION, from_config, to_config
    from qvgen.packing.layout import TensorSpec, layer_layout, packed_bytes, row_sums, validate_layer

__all__ = [
    "FORMAT_VERSION",
    "TensorSpec",
    "from_config",
    "layer_layout",
    "pack",
    "packed_bytes",
    "row_sums",
    "to_config",
    "unpack",
    "validate_layer",
]

__getattr__ = lazy(
    {
        **dict.fromkeys(("pack", "unpack"), "qvgen.packing.bits"),
        **dict.fromkeys(("FORMAT_VERSION", "from_config", "to_config"), "qvgen.packing.config"),
        **dict.fromkeys(("TensorSpec", "layer_layout", "packed_bytes", "row_sums", "validate_layer"), "qvgen.packing.layout"),
    }
)
