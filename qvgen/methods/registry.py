"""Methods that params.yaml can name. Each has a module of its own, which says what it is and where it deviates."""

from __future__ import annotations

from qvgen.methods import dsa, efficientdm, finetune, kd, lsq, mse, qvgen, qvgen_plus, rtn
from qvgen.methods.method import Method

# svdquant, viditq and qdm compute, and would import PyTorch; their modules are named in `calibration`.
_MODULES = (rtn, mse, lsq, efficientdm, kd, finetune, qvgen, dsa, qvgen_plus)

METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in _MODULES} | {
    method.name: method
    for method in (
        Method(
            name="svdquant",
            calibration="qvgen.methods.svdquant",
            scheme_changes={"input_scaling": True, "low_rank": 32},
            trained=False,
        ),
        # 128 divides the widths of all published models.
        Method(
            name="viditq",
            calibration="qvgen.methods.viditq",
            scheme_changes={"input_scaling": True, "input_rotation": 128},
            trained=False,
        ),
        Method(
            name="qdm",
            calibration="qvgen.methods.qdm",
            scheme_changes={"input_scaling": True},
            zero_points=False,
        ),
    )
}
