"""What is quantized, and how: the same two classes in params.yaml, in code and in a packed model's config.json."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MIN_BITS, MAX_BITS = 2, 8

EXTRAS = ("input_scaling", "input_rotation", "low_rank")

Strategy = Literal["tensor", "channel", "group", "token"]
ZeroPointDomain = Literal["float", "integer"]
LONGEST_PATTERN = 1000  # characters of an entry of `targets` or `ignore`


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class QuantArgs(_Frozen):
    """One uniform affine quantizer: `q = round(x / scale) + zero_point`, clamped to `num_bits` bits.

    Codes are unsigned in [0, 2**num_bits - 1]; `symmetric` fixes the zero point at 2**(num_bits - 1), which is the usual
    signed range written without a sign.
    """

    num_bits: int = Field(default=4, ge=MIN_BITS, le=MAX_BITS, description="bits per value")
    symmetric: bool = False
    strategy: Strategy = "channel"
    group_size: int | None = Field(default=None, ge=2, description="values that share a scale; only for strategy 'group'")
    zero_point_domain: ZeroPointDomain = Field(
        default="integer", description="'float': the zero point is any real number, as the public QVGen code trains it"
    )

    @property
    def max_code(self) -> int:
        """P = 2**b - 1, the largest code."""
        return 2**self.num_bits - 1

    @property
    def symmetric_zero_point(self) -> int:
        return 2 ** (self.num_bits - 1)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if (self.strategy == "group") != (self.group_size is not None):
            raise ValueError("group_size belongs to strategy 'group', and strategy 'group' needs it")
        if self.symmetric and self.zero_point_domain == "float":
            raise ValueError("a symmetric quantizer has no zero point to keep as float: use zero_point_domain 'integer'")
        return self


class QuantScheme(_Frozen):
    """Quantization of the linear layers of one model.

    `targets` and `ignore` name layers: a class name ("Linear"), a full name ("blocks.0.ffn.net.2"), or "re:" and a regular
    expression matched from the start of the full name. An empty `targets` means the family's default, the linear layers
    of the transformer blocks.

    The last three fields are extras that some methods add to each layer at inference. They are left out of config.json while
    they are off.
    """

    weights: QuantArgs = QuantArgs(zero_point_domain="float")
    input_activations: QuantArgs | None = QuantArgs(strategy="token")
    timestep_groups: int = Field(default=50, ge=1, le=1000, description="groups of timesteps, each with its own learned clips")
    targets: tuple[str, ...] = Field(default=(), strict=False)
    ignore: tuple[str, ...] = Field(default=(), strict=False)
    input_scaling: bool = Field(default=False, description="inputs are divided per channel by a stored vector, then quantized")
    input_rotation: int | None = Field(
        default=None, ge=2, description="size of the Hadamard blocks that rotate the (scaled) inputs, a power of two"
    )
    low_rank: int = Field(
        default=0, ge=0, description="largest rank of the 16-bit branch beside the packed weight; see rank_of"
    )

    @field_validator("targets", "ignore")
    @classmethod
    def _valid_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if len(pattern) > LONGEST_PATTERN:
                raise ValueError(f"{pattern[:40]!r}... has {len(pattern)} characters, more than {LONGEST_PATTERN}")
            try:
                re.compile(pattern.removeprefix("re:"))
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return patterns

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.weights.strategy == "token":
            raise ValueError("weights have no tokens: strategy must be tensor, channel or group")
        activations = self.input_activations
        if activations is not None and activations.strategy != "token":
            raise ValueError("input_activations are quantized per token at run time: strategy must be token")
        if activations is not None and activations.zero_point_domain != "integer":
            raise ValueError("input_activations need an integer zero point: zero_point_domain must be integer")
        if self.input_rotation is not None and self.input_rotation & (self.input_rotation - 1):
            raise ValueError(f"input_rotation must be a power of two, found {self.input_rotation}")
        return self

    @property
    def extras(self) -> dict[str, Any]:
        """The extras that are on: fields of EXTRAS that do not have their default."""
        return {name: getattr(self, name) for name in EXTRAS if getattr(self, name) != type(self).model_fields[name].default}

    def without_extras(self) -> QuantScheme:
        return self.model_copy(update={name: type(self).model_fields[name].default for name in EXTRAS})

    def rank_of(self, out_features: int, in_features: int) -> int:
        """Rank of the 16-bit branch of a layer: `low_rank`, but at most a sixteenth of the layer's smaller side.

        That much costs up to 2 bits per weight of the layer, in 16-bit factors; rank 32 on a square layer 128 wide would cost
        8, twice what the packed weight of a 4-bit model has.
        """
        return min(self.low_rank, max(1, min(out_features, in_features) // 16))

    def check_rotation(self, in_features: int) -> None:
        """Raise ValueError unless the rotation's blocks divide a layer's input."""
        if self.input_rotation is not None and in_features % self.input_rotation:
            largest = in_features & -in_features
            raise ValueError(
                f"in_features {in_features} is not a multiple of input_rotation {self.input_rotation}; "
                f"choose {largest if largest > 1 else 'null'} or a smaller power of two"
            )

    @property
    def name(self) -> str:
        """Short name in the field's notation, such as W4A4 (A16: activations stay in floating point)."""
        activations = self.input_activations
        return f"W{self.weights.num_bits}A{activations.num_bits if activations else 16}"
