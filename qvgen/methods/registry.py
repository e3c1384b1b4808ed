"""Methods that params.yaml can name. Each has a module of its own, which says what it is and where it deviates."""

from __future__ import annotations

from qvgen.methods import dsa, efficientdm, finetune, kd, lsq, mse, qvgen, rtn
from qvgen.methods.method import Method

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD for module in (rtn, mse, lsq, efficientdm, kd, finetune, qvgen, dsa)
}
