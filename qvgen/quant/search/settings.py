"""The knobs that every search has. Imports no PyTorch: params.yaml is read with it."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SearchSettings(BaseModel):
    """How finely grids are searched. Section `calibrate` of params.yaml is one of these, with more fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    mse_exponent: float = Field(gt=0, le=8, description="exponent of the error that the weight range search minimises")
    weight_candidates: int = Field(ge=1, le=100, description="ranges tried per channel: 1.00, 0.99, ... of min/max")
    clip_candidates: tuple[float, ...] = Field(min_length=1, strict=False, description="activation clips tried, in (0, 1)")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        bad = [c for c in self.clip_candidates if not 0 < c < 1]
        if bad:
            raise ValueError(f"clip_candidates must lie strictly between 0 and 1, found {bad}")
        return self
