"""The triton backend: integer products on NVIDIA GPUs. What runs where, and why: architectures.py."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F

from qvgen.kernels.fused_ops import Gated, Norm
from qvgen.kernels.registry import Arguments, BlockOp, LayerTensors, PackedWeight, PreparedWeight
from qvgen.kernels.triton import architectures, block_functions
from qvgen.kernels.triton.layout import to_planes, to_words

OLDEST_TRITON = (3, 6)
_INT32 = 2**31


class TritonBackend:
    """Weights stay packed: 2, 3 and 4 bits in as many bits, 5 to 8 in 8 (layout.py)."""

    name = "triton"
    devices: tuple[str, ...] = ("cuda",)
    block_ops: Mapping[str, BlockOp] = block_functions.BLOCK_OPS

    def available(self) -> str:
        return refusal()

    def supports(self, layer: PackedWeight) -> str:
        device = layer.words.device
        if device.type == "cuda" and (reason := device_refusal(torch.cuda.get_device_capability(device))):
            return reason
        if layer.activations is None:
            return ""
        # Sums of (a - z_a) q_w are kept in 32 bits.
        most = (_INT32 - 1) // (layer.activations.max_code * layer.args.max_code)
        return "" if layer.in_features <= most else f"in_features {layer.in_features} is more than {most}"

    def slower(self, layer: PackedWeight) -> str:
        return ""

    def prepare(self, layer: PackedWeight) -> PreparedWeight:
        n, groups = layer.row_sum.shape
        weight = to_planes(layer.words, layer.in_features, groups, layer.args.num_bits)
        # contiguous: an operator's arguments may not share memory within themselves
        scale = layer.scale.expand(n, -1).contiguous()
        zero_point = None if layer.zero_point is None else layer.zero_point.expand(n, -1).contiguous()
        return PreparedWeight(self.name, weight, scale, zero_point, layer.row_sum)

    def stored_words(self, prepared: PreparedWeight, in_features: int, num_bits: int) -> torch.Tensor:
        return to_words(prepared.weight, in_features, prepared.scale.shape[1], num_bits)

    def linear(
        self,
        x: torch.Tensor,
        layers: Sequence[LayerTensors],
        arguments: Arguments,
        outputs: Sequence[torch.Tensor],
        gelu: bool,
    ) -> None:
        from qvgen.kernels.triton import launch

        bits = arguments.activation_bits
        if bits is None:
            for layer, y in zip(layers, outputs, strict=True):
                if not launch.weight_only_in_loop(x, layer, arguments.weight_bits, gelu, y):
                    y.copy_(_weight_only(x, layer, arguments.weight_bits, gelu))
            return
        if x.numel():  # else no tokens, no outputs
            _integer(x, None, layers, arguments, outputs, gelu, None)

    def fused_linear(
        self,
        x: torch.Tensor,
        norm: Norm | None,
        layers: Sequence[LayerTensors],
        arguments: Arguments,
        outputs: Sequence[torch.Tensor],
        gated: Gated | None,
    ) -> bool:
        """As kernels/fused_ops.py has it; layers whose inputs are not quantized are not fused."""
        if not _fuses(x, norm, gated, arguments):
            return False
        if x.numel():
            _integer(x, norm, layers, arguments, outputs, False, gated)
        return True

    def feed_forward(
        self, x: torch.Tensor, up: LayerTensors, down: LayerTensors, arguments: Arguments, output: torch.Tensor
    ) -> None:
        if arguments.activation_bits is None:
            hidden = x.new_empty((*x.shape[:-1], len(up.weight_scale)))
            self.linear(x, [up], arguments, [hidden], True)
            self.linear(hidden, [down], arguments, [output], False)
        elif x.numel():
            _integer_feed_forward(x, None, up, down, arguments, output, None)

    def fused_feed_forward(
        self,
        x: torch.Tensor,
        norm: Norm,
        up: LayerTensors,
        down: LayerTensors,
        arguments: Arguments,
        output: torch.Tensor,
        gate: torch.Tensor | None,
    ) -> bool:
        """As kernels/fused_ops.py has it."""
        gated = Gated(x, gate)
        if not _fuses(x, norm, gated, arguments):
            return False
        if x.numel():
            _integer_feed_forward(x, norm, up, down, arguments, output, gated)
        return True


def _fuses(x: torch.Tensor, norm: Norm | None, gated: Gated | None, arguments: Arguments) -> bool:
    tensors = [x, *(norm[:4] if norm else ()), *(gated or ())]
    readable = all(tensor is None or tensor.dtype in block_functions.DTYPES for tensor in tensors)
    return arguments.activation_bits is not None and readable and x.shape[-1] <= block_functions.MOST_FEATURES


def _integer(
    x: torch.Tensor,
    norm: Norm | None,
    layers: Sequence[LayerTensors],
    arguments: Arguments,
    outputs: Sequence[torch.Tensor],
    gelu: bool,
    gated: Gated | None,
) -> None:
    """One reading of x for every MOST_SETS layers; `gated` belongs to a single layer."""
    from qvgen.kernels.triton import launch

    for start in range(0, len(layers), launch.MOST_SETS):
        some, theirs = layers[start : start + launch.MOST_SETS], outputs[start : start + launch.MOST_SETS]
        codes = launch.quantize_tokens(x, some, arguments, _e4m3(layers[0], arguments), norm)
        for layer, input_codes, y in zip(some, codes, theirs, strict=True):
            launch.integer_linear(input_codes, layer, arguments.weight_bits, x.shape[-1], gelu, y, gated)


def _integer_feed_forward(
    x: torch.Tensor,
    norm: Norm | None,
    up: LayerTensors,
    down: LayerTensors,
    arguments: Arguments,
    output: torch.Tensor,
    gated: Gated | None,
) -> None:
    """The codes of the wide intermediate need the range of whole rows, which no tile of the first product has: its values are
    written in the dtype of x and read once, by blocks of tokens that the L2 cache holds (configurations.tokens_together)."""
    from qvgen.kernels.triton import configurations, launch

    k, wide, bits = x.shape[-1], len(up.weight_scale), arguments.weight_bits
    (codes,) = launch.quantize_tokens(x, [up], arguments, _e4m3(up, arguments), norm)
    m, shared_by = len(codes.codes), launch.tokens_per_group(x, arguments)
    wide_codes = launch.empty_codes(m, wide, down.weight_scale.shape[1], _e4m3(down, arguments), x.device)
    step = configurations.tokens_together(m, k, wide, x.element_size(), launch.cache_bytes(x.device))
    unpacked = launch.unpack(up, k, bits, codes.codes.dtype, False) if step < m else None
    hidden = x.new_empty((step, wide))
    for start in range(0, m, step):
        tokens = slice(start, min(m, start + step))
        some, theirs = (launch.Codes(*(tensor[tokens] for tensor in all_codes)) for all_codes in (codes, wide_codes))
        values = hidden[: tokens.stop - start]
        launch.integer_linear(some, up, bits, k, True, values, unpacked=unpacked)
        launch.quantize_rows(values, [down], arguments, [theirs], start, shared_by)
    launch.integer_linear(wide_codes, down, bits, wide, False, output, gated)


def _e4m3(layer: LayerTensors, arguments: Arguments) -> bool:
    from qvgen.kernels.triton import launch

    assert arguments.activation_bits is not None
    architecture, groups = launch.architecture_of(layer.weight.device), layer.weight_scale.shape[1]
    return launch.uses_e4m3(architecture, arguments.weight_bits, arguments.activation_bits, groups)


def _weight_only(x: torch.Tensor, layer: LayerTensors, weight_bits: int, gelu: bool) -> torch.Tensor:
    """The layer unpacked into a buffer in the dtype of x, and torch's own product: as the reference."""
    from qvgen.kernels.triton import launch

    dense = launch.unpack(layer, x.shape[-1], weight_bits, x.dtype, True)
    y = F.linear(x, dense, None if layer.bias is None else layer.bias.to(x.dtype))
    return F.gelu(y, approximate="tanh") if gelu else y


@cache
def refusal() -> str:
    """Why no GPU kernel can run on this machine, worded for a user; empty if one can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: `pip install qvgen[triton]` (Linux; PyTorch's builds for CUDA bring it along)"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}: `pip install -U triton`"
    if torch.version.cuda is None:
        return f"this PyTorch, {torch.__version__}, was built without CUDA; install a build with it (pytorch.org)"
    if not torch.cuda.is_available():
        return f"PyTorch finds no usable NVIDIA GPU: {_driver_message()}"
    cards = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    reasons = [device_refusal(card) for card in cards]
    return "" if "" in reasons else "; ".join(dict.fromkeys(reasons))


def device_refusal(capability: tuple[int, int]) -> str:
    """Why a card cannot run the kernels; empty if it can."""
    if architectures.of(capability) is not None:
        return ""
    known = ", ".join(entry.name for entry in architectures.ARCHITECTURES)
    return f"a GPU of compute capability {capability[0]}.{capability[1]} is not supported; kernels exist for {known}"


def missing(device: torch.device) -> str:
    """Why the kernels cannot run on this GPU; empty if they can."""
    return refusal() or device_refusal(torch.cuda.get_device_capability(device))


def _driver_message() -> str:
    """What PyTorch says of the driver: there is none, or it is too old for this build, with both versions."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "the driver lists none (CUDA_VISIBLE_DEVICES?)"
