"""The packed format of one linear layer as code: names, shapes and dtypes of its tensors, its size, and its checks.

| tensor | shape | dtype | when |
|---|---|---|---|
| weight_packed | (N, ceil(K num_bits / 32)) | int32 | see packing/bits.py |
| weight_scale | (rows, G) | float32 | |
| weight_zero_point | (rows, G) | float32 | asymmetric; whole numbers if zero_point_domain is integer |
| weight_row_sum | (N, G) | int32 | sums of the codes along K |
| weight_shape | (2,) | int64 | (N, K) |
| input_clip_lower, input_clip_upper | (timestep groups,) | float32 | quantized inputs |
| bias | (N,) | any float | layers with a bias |
| input_scale | (K,) | float32 | schemes with input_scaling; positive |
| low_rank_up, low_rank_down | (N, R), (R, K) | any float | schemes with low_rank; R is QuantScheme.rank_of(N, K) |

G is the number of groups along K, 1 unless strategy is group; rows is N, or 1 for strategy tensor, whose one scale is stored
once. Row sums are per group because the integer path corrects each group with its own zero point.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from qvgen.packing.bits import packed_words, unpack
from qvgen.quant.scheme import QuantArgs, QuantScheme

PACKED, SCALE, ZERO_POINT, ROW_SUM = "weight_packed", "weight_scale", "weight_zero_point", "weight_row_sum"
SHAPE, CLIP_LOWER, CLIP_UPPER, BIAS = "weight_shape", "input_clip_lower", "input_clip_upper", "bias"
_UNPACKED = 2**20  # codes that a check unpacks at a time
PACKED_NAMES = (PACKED, SCALE, ZERO_POINT, ROW_SUM, SHAPE, CLIP_LOWER, CLIP_UPPER)
INPUT_SCALE, LOW_RANK_UP, LOW_RANK_DOWN = "input_scale", "low_rank_up", "low_rank_down"
EXACT_NAMES = (*PACKED_NAMES, INPUT_SCALE)  # never cast
LARGEST_VALUE = 2.0**64  # of a weight or an input scale: the square of a larger one is infinite in float32
LARGEST_ZERO_POINT = 2.0**24  # beside a larger one float32 cannot tell codes apart; calibration gives at most max_code
CAST_NAMES = (BIAS, LOW_RANK_UP, LOW_RANK_DOWN)  # in the model's dtype


class TensorSpec(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def weight_groups(in_features: int, args: QuantArgs) -> int:
    """G, the number of scales along K. Raises ValueError if the groups do not divide K."""
    if args.group_size is None:
        return 1
    if in_features % args.group_size:
        raise ValueError(
            f"in_features {in_features} is not a multiple of group_size {args.group_size}; "
            "choose a divisor or strategy 'channel'"
        )
    return in_features // args.group_size


def layer_layout(
    in_features: int, out_features: int, scheme: QuantScheme, has_bias: bool, dtype: torch.dtype = torch.bfloat16
) -> dict[str, TensorSpec]:
    """Every tensor of a packed layer; `dtype` is that of CAST_NAMES. Raises ValueError if the groups or the rotation's
    blocks do not divide K."""
    args = scheme.weights
    scheme.check_rotation(in_features)
    groups = weight_groups(in_features, args)
    grid = (1 if args.strategy == "tensor" else out_features, groups)
    layout = {
        PACKED: TensorSpec((out_features, packed_words(in_features, args.num_bits)), torch.int32),
        SCALE: TensorSpec(grid, torch.float32),
        ROW_SUM: TensorSpec((out_features, groups), torch.int32),
        SHAPE: TensorSpec((2,), torch.int64),
    }
    if not args.symmetric:
        layout[ZERO_POINT] = TensorSpec(grid, torch.float32)
    if scheme.input_activations is not None:
        layout[CLIP_LOWER] = layout[CLIP_UPPER] = TensorSpec((scheme.timestep_groups,), torch.float32)
    if has_bias:
        layout[BIAS] = TensorSpec((out_features,), dtype)
    if scheme.input_scaling:
        layout[INPUT_SCALE] = TensorSpec((in_features,), torch.float32)
    if rank := scheme.rank_of(out_features, in_features):
        layout[LOW_RANK_UP] = TensorSpec((out_features, rank), dtype)
        layout[LOW_RANK_DOWN] = TensorSpec((rank, in_features), dtype)
    return layout


def packed_bytes(in_features: int, out_features: int, scheme: QuantScheme, has_bias: bool, dtype_bytes: int = 2) -> int:
    """Bytes of a packed layer's tensors, everything but the file's header; `dtype_bytes` per element of CAST_NAMES."""
    layout = layer_layout(in_features, out_features, scheme, has_bias)
    return sum(spec.numel * dtype_bytes if name in CAST_NAMES else spec.nbytes for name, spec in layout.items())


def row_sums(codes: torch.Tensor, groups: int) -> torch.Tensor:
    """Sums (N, G) int32 of codes (N, K) uint8."""
    n, k = codes.shape
    return codes.view(n, groups, k // groups).sum(-1, dtype=torch.int32)


def validate_layer(
    layer: str,
    tensors: Mapping[str, torch.Tensor],
    in_features: int,
    out_features: int,
    scheme: QuantScheme,
    has_bias: bool,
    check_codes: bool = True,
) -> None:
    """Raise ValueError, naming the layer and tensor, unless `tensors` are a whole and consistent packed layer.

    `check_codes` unpacks the weight and compares its sums with weight_row_sum, which finds damaged codes.
    """
    layout = layer_layout(in_features, out_features, scheme, has_bias)
    if missing := sorted(layout.keys() - tensors.keys()):
        raise ValueError(f"packed layer {layer}: {', '.join(missing)} missing; the checkpoint is incomplete, export it again")
    if unexpected := sorted(tensors.keys() - layout.keys()):
        raise ValueError(f"packed layer {layer}: {', '.join(unexpected)} not expected of a {scheme.name} layer like this one")
    for name, spec in layout.items():
        found = tensors[name]
        dtype_matches = found.dtype.is_floating_point if name in CAST_NAMES else found.dtype == spec.dtype
        if tuple(found.shape) != spec.shape or not dtype_matches:
            raise ValueError(
                f"{layer}.{name}: expected {list(spec.shape)} {spec.dtype}, found {list(found.shape)} {found.dtype}; "
                "the checkpoint does not belong to this model or scheme"
            )
        if found.dtype.is_floating_point and not torch.isfinite(found).all():
            raise ValueError(f"{layer}.{name}: holds NaN or Inf; the checkpoint is damaged, export it again")
    for name in (SCALE, INPUT_SCALE):
        if name in tensors and not (tensors[name] > 0).all():
            raise ValueError(f"{layer}.{name}: scales must be positive; the checkpoint is damaged, export it again")
    if tensors[SHAPE].tolist() != [out_features, in_features]:
        raise ValueError(f"{layer}.{SHAPE}: expected {[out_features, in_features]}, found {tensors[SHAPE].tolist()}")
    if scheme.weights.zero_point_domain == "integer" and (zero_point := tensors.get(ZERO_POINT)) is not None:
        whole = (zero_point == zero_point.trunc()) & (zero_point >= 0) & (zero_point <= scheme.weights.max_code)
        if not whole.all():
            raise ValueError(
                f"{layer}.{ZERO_POINT}: zero_point_domain integer means whole numbers in [0, {scheme.weights.max_code}]"
            )
    _check_range(layer, tensors, scheme.weights)
    if check_codes and not codes_add_up(tensors[PACKED], tensors[ROW_SUM], in_features, scheme.weights):
        raise ValueError(f"{layer}.{PACKED}: the codes do not add up to {ROW_SUM}; the checkpoint is damaged, export it again")


def _check_range(layer: str, tensors: Mapping[str, torch.Tensor], args: QuantArgs) -> None:
    """Raise ValueError for finite values with which nothing can be computed."""
    for name in (CLIP_LOWER, CLIP_UPPER):
        if name in tensors and not ((tensors[name] > 0) & (tensors[name] <= 1)).all():
            raise ValueError(f"{layer}.{name}: clips must lie in (0, 1]; the checkpoint is damaged, export it again")
    offset = torch.tensor(float(args.max_code))
    if (zero_point := tensors.get(ZERO_POINT)) is not None:
        if (largest := zero_point.abs().amax()) > LARGEST_ZERO_POINT:
            raise ValueError(
                f"{layer}.{ZERO_POINT}: {float(largest):.3g} is beyond {LARGEST_ZERO_POINT:.0f}, where codes make no "
                "difference; the checkpoint is damaged, export it again"
            )
        offset = torch.maximum(zero_point.abs(), (args.max_code - zero_point).abs())
    values = {SCALE: tensors[SCALE].double() * offset} | (
        {INPUT_SCALE: tensors[INPUT_SCALE]} if INPUT_SCALE in tensors else {}
    )
    for name, value in values.items():
        if (largest := value.amax()) > LARGEST_VALUE:
            raise ValueError(
                f"{layer}.{name}: makes values up to {float(largest):.3g}, beyond {LARGEST_VALUE:.3g}; the checkpoint is "
                "damaged, export it again"
            )


def codes_add_up(packed: torch.Tensor, sums: torch.Tensor, in_features: int, args: QuantArgs) -> bool:
    """Whether the codes of packed words (N, ...) have the sums (N, G)."""
    # Some rows at a time: unpacked, a large layer would need many times the memory of the packed one.
    rows, groups = max(1, _UNPACKED // in_features), weight_groups(in_features, args)
    parts = zip(packed.split(rows), sums.split(rows), strict=True)
    return all(torch.equal(row_sums(unpack(p, args.num_bits, in_features), groups), part) for p, part in parts)


def fault_of_loading(
    state: Mapping[str, torch.Tensor],
    prefix: str,
    own: tuple[torch.Tensor, torch.Tensor],
    in_features: int,
    args: QuantArgs,
) -> str | None:
    """Why loading `state` would leave a layer whose weight_packed and weight_row_sum are `own` with codes that do not add up;
    None if it would not, or if the tensors are empty or of another shape or dtype, which loading itself refuses."""
    words, sums = (state.get(prefix + name, tensor) for name, tensor in zip((PACKED, ROW_SUM), own, strict=True))
    if words is own[0] and sums is own[1]:
        return None
    alike = (words.shape, sums.shape) == (own[0].shape, own[1].shape) and words.dtype == sums.dtype == torch.int32
    if not alike or words.is_meta or sums.is_meta or codes_add_up(words, sums.to(words.device), in_features, args):
        return None
    return f"{prefix}{PACKED}: the codes do not add up to {ROW_SUM}; nothing was loaded into this layer"
