"""What loading a packed transformer takes of the host's memory: its mapped file, once, on the way to any device, while its
hashes are compared."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qvgen.checkpoint.packed import write_transformer
from qvgen.models.wan import WanFamily
from qvgen.models.wan.text import TINY
from qvgen.nn.packed_linear import packed_layers
from qvgen.nn.swap import convert_, prepare_
from qvgen.quant.scheme import QuantScheme

# 64 MB of 4-bit weights in layers of up to 4 MB, whose codes are checked one by one.
CONFIG = {**TINY, "num_layers": 5, "num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 8192}
COPIES = 1.5  # of the file, with a layer's codes and what Python allocates; a second one would make it 2

SCRIPT = """
import sys, torch
from pathlib import Path
from diffusers import WanTransformer3DModel
import qvgen.integrations.diffusers
from qvgen.device import peak_resident_mb

folder, small, device = sys.argv[1:]
torch.zeros(1, device=device)
load = lambda path: WanTransformer3DModel.from_pretrained(path, dtype=torch.bfloat16, device_map=device)
load(small)  # imports what loading does
Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted
before = peak_resident_mb()
model = load(folder)
print(peak_resident_mb() - before)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A packed transformer, and a small one."""
    made, scheme = tmp_path_factory.mktemp("memory"), QuantScheme()
    for name, config in (("large", CONFIG), ("small", TINY)):
        model = WanFamily.transformer(config)
        prepare_(model, scheme, default_targets=WanFamily.default_targets)
        convert_(model)
        names = [layer for layer, _ in packed_layers(model)]
        write_transformer(model, scheme, names, made / name, torch.bfloat16)
    return [made / "large", made / "small"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux counts a peak anew")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_file_is_in_memory_once(folders: list[Path], device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here: `make gpu` runs this on one")
    size = sum(path.stat().st_size for path in folders[0].glob("*.safetensors")) / 1e6
    command = [sys.executable, "-c", SCRIPT, *map(str, folders), device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert size > 60 and 0.8 * size < float(done.stdout) < COPIES * size, (size, done.stdout)
