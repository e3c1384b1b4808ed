"""The NEON paths, compiled for 64-bit ARM and run on QEMU: correctness only, an emulator has no speed."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
COMPILER, EMULATOR, SYSTEM = "aarch64-linux-gnu-g++", "qemu-aarch64-static", Path("/usr/aarch64-linux-gnu")
INSTALL = "Debian: apt install g++-aarch64-linux-gnu qemu-user-static"


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if platform.machine() in ("aarch64", "arm64"):
        pytest.skip("this is an ARM processor: the other tests run its paths")
    if missing := [tool for tool in (COMPILER, EMULATOR, "cmake") if not shutil.which(tool)]:
        pytest.skip(f"{', '.join(missing)} not installed ({INSTALL})")
    build = tmp_path_factory.mktemp("arm")
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"]
    run("cmake", "-S", ROOT, "-B", build, *target)
    run("cmake", "--build", build, "-j", 2)
    source, header = ROOT / "tests/kernels/cpu/arm_driver.cpp", ROOT / "qvgen/kernels/cpu/csrc"
    run(COMPILER, "-std=c++17", "-O1", "-Wall", f"-I{header}", source, f"-L{build}", "-lqvgen_cpu", "-o", build / "driver")
    return build / "driver"


@pytest.mark.parametrize(
    ("processor", "checked", "missing"),
    [("max", ["neon_dotprod", "neon", "portable"], []), ("cortex-a72", ["neon", "portable"], ["neon_dotprod"])],
)
def test_neon_paths(driver: Path, processor: str, checked: list[str], missing: list[str]) -> None:
    said = run(EMULATOR, "-cpu", processor, "-L", SYSTEM, "-E", f"LD_LIBRARY_PATH={driver.parent}", driver).splitlines()
    assert [line.removeprefix("checked: ") for line in said if line.startswith("checked: ")] == checked
    assert [line.removeprefix("not supported: ") for line in said if line.startswith("not supported: ")] == missing
    assert said[-1] == "0 failures"
