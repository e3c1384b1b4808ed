"""The cpu backend: packed layers in compiled integer kernels, on every processor the library has a path for."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch

from qvgen.kernels.cpu import block_functions, library
from qvgen.kernels.cpu.choice import PYTORCH, choice
from qvgen.kernels.cpu.descriptions import DTYPES, describe_input, describe_layer, pointer
from qvgen.kernels.cpu.transformer_block import transformer_block
from qvgen.kernels.registry import Arguments, BlockOp, LayerTensors, PackedWeight, PreparedWeight
from qvgen.kernels.whole_block import Layers, Step
from qvgen.packing.bits import packed_words

_ALIGNMENT = 64  # bytes, a cache line
_INT32 = 2**31


class CpuBackend:
    """Weights stay packed: 2, 3 and 4 bits in as many bits, 5 to 8 in 8 (cpu/layout.h)."""

    name = "cpu"
    devices: tuple[str, ...] = ("cpu",)
    block_ops: Mapping[str, BlockOp] = block_functions.BLOCK_OPS

    def available(self) -> str:
        return library.refusal()

    def supports(self, layer: PackedWeight) -> str:
        if layer.activations is None:
            return ""
        # Sums of (a - z_a)(q - z_w) are kept in 32 bits.
        most = (_INT32 - 1) // (layer.activations.max_code * layer.args.max_code)
        return "" if layer.in_features <= most else f"in_features {layer.in_features} is more than {most}"

    def slower(self, layer: PackedWeight) -> str:
        """Of weight-only layers, on processors whose PyTorch multiplies bfloat16 so fast that it makes up for unpacking."""
        measured = choice()
        if layer.activations is not None or measured.compiled_weight_only:
            return ""
        ours, pytorch = measured.weight_only_ms["cpu"], measured.weight_only_ms[PYTORCH]
        return f"slower on this processor than PyTorch's: {ours:.2f} ms against {pytorch:.2f} (measured, inputs not quantized)"

    def prepare(self, layer: PackedWeight) -> PreparedWeight:
        _check_stored(layer)
        n, groups = layer.row_sum.shape
        bits, words, row_sum = layer.args.num_bits, layer.words.contiguous(), layer.row_sum.contiguous()
        # contiguous: an operator's arguments may not share memory within themselves
        scale = layer.scale.expand(n, -1).contiguous()
        zero_point = None if layer.zero_point is None else layer.zero_point.expand(n, -1).contiguous()
        functions = library.load()
        weight = _aligned(functions.qvgen_panel_bytes(n, layer.in_features, groups, bits))
        library.check(
            functions.qvgen_pack_panels(
                words.data_ptr(),
                words.shape[1] * words.element_size(),
                scale.data_ptr(),
                pointer(zero_point),
                row_sum.data_ptr(),
                n,
                layer.in_features,
                groups,
                bits,
                weight.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return PreparedWeight(self.name, weight, scale, zero_point, row_sum)

    def stored_words(self, prepared: PreparedWeight, in_features: int, num_bits: int) -> torch.Tensor:
        words = torch.empty((len(prepared.scale), packed_words(in_features, num_bits)), dtype=torch.int32)
        library.check(
            library.load().qvgen_unpack_panels(
                prepared.weight.data_ptr(),
                prepared.weight.numel(),
                words.data_ptr(),
                len(words),
                words.shape[1] * words.element_size(),
                torch.get_num_threads(),
            )
        )
        return words

    def linear(
        self,
        x: torch.Tensor,
        layers: Sequence[LayerTensors],
        arguments: Arguments,
        outputs: Sequence[torch.Tensor],
        gelu: bool,
    ) -> None:
        x, targets = _computable(x), [y if y.dtype in DTYPES else torch.empty_like(y, dtype=torch.float32) for y in outputs]
        # Named, because they keep alive what they point to and the array's copies do not.
        parts = [describe_layer(tensors, arguments, y, x.shape[-1], gelu) for tensors, y in zip(layers, targets, strict=True)]
        described = ctypes.byref(parts[0]) if len(parts) == 1 else (library.Layer * len(parts))(*parts)
        source = describe_input(x, arguments)
        library.check(
            library.load().qvgen_linear(library.isa(), described, len(parts), ctypes.byref(source), torch.get_num_threads())
        )
        for y, target in zip(outputs, targets, strict=True):
            if y is not target:
                y.copy_(target)

    def feed_forward(
        self, x: torch.Tensor, up: LayerTensors, down: LayerTensors, arguments: Arguments, output: torch.Tensor
    ) -> None:
        x = _computable(x)
        target = output if output.dtype in DTYPES else torch.empty_like(output, dtype=torch.float32)
        hidden = up.weight_scale.shape[0]
        parts = describe_layer(up, arguments, None, x.shape[-1], True), describe_layer(down, arguments, target, hidden, False)
        described, source = (library.Layer * 2)(*parts), describe_input(x, arguments)
        library.check(
            library.load().qvgen_feed_forward(library.isa(), described, ctypes.byref(source), torch.get_num_threads())
        )
        if target is not output:
            output.copy_(target)

    def transformer_block(
        self, x: torch.Tensor, steps: Sequence[Step], layers: Layers, arguments: Arguments
    ) -> torch.Tensor | None:
        return transformer_block(x, steps, layers, arguments)


def _check_stored(layer: PackedWeight) -> None:
    """Raise ValueError unless the tensors have the sizes that the library will read."""
    if layer.words is None or layer.scale is None or layer.row_sum is None:
        raise ValueError("a stored weight has words, scales and row sums; one is missing")
    row_sum, n, groups = layer.row_sum, *(layer.row_sum.shape if layer.row_sum.ndim == 2 else (0, 0))
    words = packed_words(layer.in_features, layer.args.num_bits)
    grids = [layer.scale] if layer.zero_point is None else [layer.scale, layer.zero_point]
    if (
        row_sum.ndim != 2
        or row_sum.dtype != torch.int32
        or layer.words.dtype != torch.int32
        or tuple(layer.words.shape) != (n, words)
        or any(g.dtype != torch.float32 or tuple(g.shape) not in ((n, groups), (1, groups)) for g in grids)
        or groups < 1
        or layer.in_features < 1
        or layer.in_features % groups
        or any(t.device.type != "cpu" or t.layout != torch.strided for t in (layer.words, row_sum, *grids))
    ):
        shapes = [tuple(t.shape) for t in (layer.words, row_sum, *grids)]
        raise ValueError(
            f"a weight of {layer.in_features} inputs and {layer.args.num_bits} bits has int32 words (N, {words}), int32 row "
            f"sums (N, G) and float32 scales and zero points (N or 1, G), found {shapes}"
        )


def _computable(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous() if x.dtype in DTYPES else x.to(torch.float32).contiguous()


def _aligned(size: int) -> torch.Tensor:
    memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
    start = -memory.data_ptr() % _ALIGNMENT
    return memory[start : start + size]
