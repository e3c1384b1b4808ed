"""Files of tensors: the bytes of safetensors' own writer, without its copies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvgen.tensors import DTYPE_NAMES, save_tensors

# Four tensors of 64 MB; prints by how many MB the peak of resident memory grew.
SAVE = """
import sys, torch
from qvgen.device import peak_resident_mb
from qvgen.tensors import save_tensors
tensors = {str(n): torch.full((16 << 20,), float(n)) for n in range(4)}
before = peak_resident_mb()
save_tensors(sys.argv[1], tensors)
print(peak_resident_mb() - before)
"""


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_of_safetensors_itself(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, dtype in enumerate(reversed(DTYPE_NAMES)):
        for name, shape in ((f"a{number}", (3, 5)), (f"b{-number}", ()), (f"ü{number}", (0, 4))):
            tensors[name] = torch.randint(0, 2, shape, generator=generator).to(dtype)
    save_tensors(tmp_path / "ours", tensors, metadata)
    save_file(tensors, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_views_parameters_and_sorted_metadata(tmp_path: Path) -> None:
    given = {"t": torch.nn.Parameter(torch.arange(12.0).view(3, 4)).T, "s": torch.arange(8)[::2]}
    save_tensors(tmp_path / "file", given, {"z": "1", "a": "2"})
    read = load_file(tmp_path / "file")
    assert all(torch.equal(read[name], tensor) for name, tensor in given.items())
    data = (tmp_path / "file").read_bytes()
    assert list(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]) == ["a", "z"]


def test_what_is_not_stored_leaves_the_old_file(tmp_path: Path) -> None:
    save_tensors(tmp_path / "file", {"a": torch.ones(1)})
    with pytest.raises(ValueError, match=r"^b is torch.complex64, which is not stored; cast it to one of"):
        save_tensors(tmp_path / "file", {"b": torch.ones(1, dtype=torch.complex64)})
    assert load_file(tmp_path / "file").keys() == {"a"} and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_writing_copies_nothing(tmp_path: Path) -> None:
    """A copy of all tensors would be 268 MB."""
    done = subprocess.run([sys.executable, "-c", SAVE, str(tmp_path / "file")], capture_output=True, text=True, check=True)
    assert (tmp_path / "file").stat().st_size > 4 * 64 << 20
    assert float(done.stdout) < 32
