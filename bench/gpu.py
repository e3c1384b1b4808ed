"""`python -m bench.gpu` (`make gpu`): tests of the GPU kernels on this machine's card. Without one it says so and succeeds.

Runs tests/kernels/triton: what the kernels compute on the card, not in the interpreter. Needs torch >= 2.11 and triton >= 3.6
and, of the other packages, those that tests import (pytest, pydantic); neither prefect, dvc nor mlflow. It measures nothing
yet: bench.linear and bench.dit_step have no --device, so no figure of a GPU exists (docs/kernels.md).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests/kernels/triton"
LIMIT_S = 500  # one call stays under nine minutes


def main() -> int:
    import torch

    from qvgen.kernels.triton.backend import refusal

    if reason := refusal():
        print(f"no GPU to test on: {reason}")
        # A card that is there and cannot be used is a failure; a machine without one is not.
        return 1 if torch.cuda.is_available() else 0
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    print(f"testing on {names}", flush=True)
    try:
        return subprocess.run([sys.executable, "-m", "pytest", "-q", str(TESTS)], timeout=LIMIT_S, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"the tests took more than {LIMIT_S} s and were ended")
        return 1


if __name__ == "__main__":
    sys.exit(main())
