"""Methods that params.yaml can name, and which parts of the pipeline each one uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """`searched`: grids come from calibration's error search, else from min/max; `trained`: quantization-aware training
    against the teacher; `phi`: with the auxiliary module and rank decay."""

    searched: bool
    trained: bool
    phi: bool


METHODS: dict[str, Method] = {
    # Round to nearest on whole ranges.
    "rtn": Method(searched=False, trained=False, phi=False),
    # Weight ranges and activation clips by error search; the strongest start without training.
    "mse": Method(searched=True, trained=False, phi=False),
    # LSQ+ with teacher loss and no Φ: the control that Φ must beat.
    "kd": Method(searched=True, trained=True, phi=False),
    # QVGen (arXiv 2505.11497).
    "qvgen": Method(searched=True, trained=True, phi=True),
}
