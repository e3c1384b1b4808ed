"""The rules of section `gate` in params.yaml: declarations only. pipelines/champion/gate.py holds a model against them."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Limit(_Part):
    """A metric, less or over another one if that is named, and what it must not exceed or fall below."""

    metric: str = Field(min_length=1, description="dotted name in metrics/evaluate.json or benchmark.json")
    minus: str | None = Field(default=None, description="metric that is subtracted")
    over: str | None = Field(default=None, description="metric that it is divided by")
    max: float | None = Field(default=None, description="the limit itself passes")
    min: float | None = Field(default=None, description="the limit itself passes")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.max is None) == (self.min is None):
            raise ValueError("give either max or min")
        if self.minus is not None and self.over is not None:
            raise ValueError("give minus or over, not both")
        return self


class ChampionLimit(_Part):
    """A metric and how far it may be behind the champion's."""

    metric: str = Field(min_length=1)
    max_drop: float | None = Field(default=None, ge=0, description="below the champion's, for what is better high")
    min_ratio: float | None = Field(default=None, gt=0, le=1, description="of the champion's, for what is better high")
    max_ratio: float | None = Field(default=None, ge=1, description="of the champion's, for what is better low")
    same_machine: bool = Field(default=False, description="left out where the champion was measured on another machine")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(limit is not None for limit in (self.max_drop, self.min_ratio, self.max_ratio)) != 1:
            raise ValueError("give one of max_drop, min_ratio, max_ratio")
        return self


class Gate(_Part):
    """The rules that a challenger must pass to become champion, by the name under which they are shown."""

    rules: dict[str, Limit] = Field(min_length=1)
    champion: dict[str, ChampionLimit]
