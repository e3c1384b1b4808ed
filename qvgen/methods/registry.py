"""Methods that params.yaml can name, and which parts of the pipeline each one uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvgen.quant.calibrate import LayerGrid

# Each imports what it calls when it is called: PyTorch takes seconds, and params.py needs the names only.


def _search(*args: Any, **settings: Any) -> LayerGrid:
    from qvgen.quant.calibrate import calibrate_layer

    return calibrate_layer(*args, **settings)


def _svdquant(*args: Any, **settings: Any) -> LayerGrid:
    from qvgen.methods.svdquant import calibrate_layer

    return calibrate_layer(*args, **settings)


def _viditq(*args: Any, **settings: Any) -> LayerGrid:
    from qvgen.methods.viditq import calibrate_layer

    return calibrate_layer(*args, **settings)


@dataclass(frozen=True)
class Method:
    """`searched`: grids come from calibration's error search, else from min/max; `trained`: quantization-aware training
    against the teacher; `phi`: with the auxiliary module and rank decay; `calibrate`: the search of one layer, with the
    signature of quant.calibrate.calibrate_layer; `scheme_changes`: what the method adds to a layer (QuantScheme's extras),
    used where params.yaml leaves it open."""

    searched: bool
    trained: bool
    phi: bool
    calibrate: Callable[..., LayerGrid] = _search
    scheme_changes: Mapping[str, Any] = field(default_factory=dict)


METHODS: dict[str, Method] = {
    # Round to nearest on whole ranges.
    "rtn": Method(searched=False, trained=False, phi=False),
    # Weight ranges and activation clips by error search; the strongest start without training.
    "mse": Method(searched=True, trained=False, phi=False),
    # SVDQuant (arXiv 2411.05007): smoothed inputs, a 16-bit low-rank branch beside the packed weight.
    "svdquant": Method(
        searched=True,
        trained=False,
        phi=False,
        calibrate=_svdquant,
        scheme_changes={"input_scaling": True, "low_rank": 32},
    ),
    # ViDiT-Q (arXiv 2406.02540): smoothed and rotated inputs. 128 divides the widths of all published models.
    "viditq": Method(
        searched=True,
        trained=False,
        phi=False,
        calibrate=_viditq,
        scheme_changes={"input_scaling": True, "input_rotation": 128},
    ),
    # LSQ+ with teacher loss and no Φ: the control that Φ must beat.
    "kd": Method(searched=True, trained=True, phi=False),
    # QVGen (arXiv 2505.11497).
    "qvgen": Method(searched=True, trained=True, phi=True),
}
