"""What a method is to the pipeline: which of its parts it uses, and how. Nothing here computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

WHOLE_RANGES = None  # no search: grids cover minimum to maximum
SEARCH = "qvgen.quant.calibrate"


@dataclass(frozen=True)
class Method:
    """A method, as params.yaml names it. Defaults are those of `kd`, plain training towards the teacher."""

    name: str
    calibration: str | None = SEARCH  # module whose `calibrate_layer` makes the grids, or WHOLE_RANGES
    scheme_changes: Mapping[str, Any] = field(default_factory=dict)  # on top of params.yaml's scheme
    trained: bool = True
    phi: bool = False  # auxiliary modules and rank decay
    adapter: bool = False  # trains low-rank adapters inside the weight quantizers, and no weights
    quantized: bool = True  # False: trains in full precision and is quantized afterwards
    zero_points: bool = True  # weight zero points are learned too
    loss: Literal["teacher", "target", "dual"] = "teacher"  # qvgen/training/loss.py
    uniform_share: float = 0.0  # share of timesteps drawn uniformly instead of as the model was trained
    optimizer: Literal["adamw", "muon"] = "adamw"
    guidance_stop: float = 1.0  # cleanness (1 - t / 1000) from which sampling goes on without guidance

    def calibrate_layer(self) -> Callable[..., Any] | None:
        """The function that searches a layer's grids (signature of qvgen.quant.calibrate.calibrate_layer), or None."""
        return None if self.calibration is None else import_module(self.calibration).calibrate_layer

    @property
    def zero_inference_cost(self) -> bool:
        """Whether the packed model computes nothing besides its quantized layers."""
        return not self.scheme_changes
