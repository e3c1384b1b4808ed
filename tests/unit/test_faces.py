"""Faces of packages: every name that one lists is there, and importing the face alone is cheap."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FACES = (
    "qvgen.quant",
    "qvgen.packing",
    "qvgen.nn",
    "qvgen.methods",
    "qvgen.training",
    "qvgen.models",
    "qvgen.checkpoint",
    "qvgen.sampling",
)


@pytest.mark.parametrize("package", FACES)
def test_every_listed_name_is_there(package: str) -> None:
    face = import_module(package)
    assert face.__doc__ and face.__all__
    assert [name for name in face.__all__ if not hasattr(face, name)] == []
    with pytest.raises(AttributeError, match="nothing"):
        _ = face.nothing


@pytest.mark.parametrize("package", FACES)
def test_a_face_alone_loads_no_pytorch(package: str) -> None:
    code = f"import sys, {package}; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
