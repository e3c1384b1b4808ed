"""What an import costs, and that everything imported is declared."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("qvgen", "stages", "comparison", "pipelines")
HEAVY = ("diffusers", "transformers", "mlflow", "prefect", "dvc")
HELP_CPU_SECONDS = 0.5
SLOW_MACHINE = 2.0  # a busy shared core takes up to this many times as long


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "module", ["qvgen", "qvgen.params", "qvgen.quant.scheme", "qvgen.quant", "qvgen.packing", "qvgen.phi"]
)
def test_low_layers_import_nothing_heavy(module: str) -> None:
    loaded = run(f"import sys, {module}; print(*(m for m in {HEAVY} if m in sys.modules))")
    assert loaded.split() == []


def test_help_is_quick() -> None:
    """CPU time, the least of three: other processes on the machine do not count."""
    code = (
        "import atexit, sys, time; sys.argv[0] = 'qvgen'\n"
        "atexit.register(lambda: print(time.process_time(), file=sys.stderr))\n"
        "from pipelines.cli.everyday import main; main()"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "generate" in done.stdout
        seconds.append(float(done.stderr.split()[-1]))
    assert min(seconds) < HELP_CPU_SECONDS * SLOW_MACHINE


def test_every_import_is_declared() -> None:
    """`pip install qvgen[pipeline,lora,triton,eight-bit]` brings all that the packages import, also those inside functions.
    One that is not installed here is looked for by its own name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    optional = ("serve", "pipeline", "lora", "triton", "eight-bit")
    specs = [*project["dependencies"], *(spec for extra in optional for spec in extras[extra])]
    declared = {canonical(re.split(r"[^\w.-]", spec)[0]) for spec in specs}
    providers = packages_distributions()
    undeclared = {
        f"{path.relative_to(ROOT)} imports {name}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for name in imported(path) - set(sys.stdlib_module_names) - set(PACKAGES)
        if declared.isdisjoint(map(canonical, providers.get(name, [name])))
    }
    assert undeclared == set()


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def imported(path: Path) -> set[str]:
    """Top-level names of the absolute imports in one file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names
