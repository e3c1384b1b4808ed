"""No stage mixes devices: all of their inner functions run on a device that is not the CPU, although there is none here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = (
    *(f"wan {method}" for method in ("qvgen", "qvgen+", "efficientdm", "svdquant", "viditq", "qdm")),
    "wan_image qvgen",
    "cogvideox qvgen",
    *(f"{family} {part}" for family in ("wan", "cogvideox") for part in ("vae", "text")),
)


@pytest.fixture(scope="module")
def walked() -> dict[str, str]:
    """What was run on the device -> the error that it ended in, or nothing. In a process of its own, which it changes."""
    done = subprocess.run([sys.executable, "-m", "tests.support.device_walk"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_runs_on_another_device(walked: dict[str, str], part: str) -> None:
    assert walked[part] == ""


@pytest.mark.slow
def test_mixed_devices_are_noticed(walked: dict[str, str]) -> None:
    assert "same device" in walked["mixed devices"]
    assert set(walked) == {*PARTS, "mixed devices"}
