"""What a method is to the pipeline: which of its parts it uses, and how. Nothing here computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from qvgen.quant.calibrate import LayerGrid


@dataclass(frozen=True)
class Method:
    """A method, as params.yaml names it. Defaults are those of `kd`, plain training towards the teacher."""

    name: str
    searched: bool = True  # grids come from calibration, else they cover whole ranges
    calibration: str = "qvgen.quant.calibrate"  # module whose `calibrate_layer` searches a layer's grids
    scheme_changes: dict[str, Any] = field(default_factory=dict)  # extras of QuantScheme, unless params.yaml has them
    trained: bool = True
    phi: bool = False  # auxiliary modules and rank decay
    adapter: bool = False  # trains low-rank adapters inside the weight quantizers, and no weights
    quantized: bool = True  # False: trains in full precision and is quantized afterwards
    zero_points: bool = True  # weight zero points are learned too
    loss: Literal["teacher", "target", "dual"] = "teacher"  # qvgen/training/loss.py
    folded: bool = False  # channels' shifts and scales are folded into the steps before, where that is free
    # Timesteps of a batch are spread evenly over their distribution, and this share of them is drawn uniformly; None: drawn
    # independently, as the model was trained.
    stratified_uniform_share: float | None = None
    caption_dropout: float | None = None  # share of prompts replaced by the empty one; None: that of params.yaml
    guidance_stop: float = 1.0  # cleanness (1 - t / 1000) from which sampling goes on without guidance

    def calibrate(self, *args: Any, **settings: Any) -> LayerGrid:
        """Search the grids of one layer; the signature is that of qvgen.quant.calibrate.calibrate_layer."""
        # Imported when it is called: PyTorch takes seconds, and params.py needs the names only.
        return import_module(self.calibration).calibrate_layer(*args, **settings)

    @property
    def zero_inference_cost(self) -> bool:
        """Whether the packed model computes nothing besides its quantized layers."""
        return not self.scheme_changes
