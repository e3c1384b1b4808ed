"""`python -m bench.training_memory [--layers 2]`: peak resident memory of a training step on a transformer of the published
width of Wan 2.1 1.3B with few layers, against its budget.

Each row is measured in a fresh process: student, teacher, Φ (rank 32) and AdamW's moments, two steps of a batch of two clips.
What is printed is the peak minus what the process held after its imports, and that in bytes per parameter of the student. The
budget counts only what is there by design: weights, gradients, two moments, the teacher, the optimizer's temporaries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROWS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "float32, micro-batch 1": {"precision": "float32", "micro_batch": 1},
    "bfloat16, micro-batch 1": {"precision": "bfloat16", "micro_batch": 1},
    "bfloat16, micro-batch 1, checkpointing": {"precision": "bfloat16", "micro_batch": 1, "checkpointing": True},
}
# Bytes per parameter of the student: weight 4, gradient 4, moments 8, teacher 4 or 2, and on the CPU, whose AdamW goes through
# all tensors at once (foreach), temporaries of up to 8 more. A fused optimizer, as on CUDA, has none.
TEMPORARIES = 8.0
BUDGET = {"float32": 20.0 + TEMPORARIES, "bfloat16": 18.0 + TEMPORARIES}
ACTIVATIONS_MB = 500.0  # of two small clips, and what allocators keep
CLIP = (16, 3, 8, 12)  # latents of 9 frames of 64 x 96
TEXT = (64, 4096)


def write_folder(folder: Path, layers: int) -> None:
    """A transformer folder with random weights in bfloat16, as published ones are stored."""
    import torch

    from qvgen.models.wan import WAN_2_1_1_3B, WanFamily

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model: Any = WanFamily.transformer({**WAN_2_1_1_3B, "num_layers": layers})
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "transformer")


def measure(folder: Path, precision: str, micro_batch: int | None = None, checkpointing: bool = False) -> dict[str, float]:
    """Of this process, which must be fresh: peak MB above imports, parameters of the student, bytes per parameter."""
    import diffusers.models  # noqa: F401  (before the first reading)
    import torch

    from qvgen.checkpoint.pipeline import load_transformer, transformer_class
    from qvgen.data.latents import LatentDataset
    from qvgen.evaluation.cost.memory import peak_resident_mb
    from qvgen.models.wan import WanFamily
    from qvgen.nn.swap import add_phi_, prepare_
    from qvgen.params import load_params
    from qvgen.training.loop import Trainer

    transformer_class(folder)
    given = load_params()
    phases = {"initial_rank": 32, "phase_steps": 1, "final_steps": 1}
    params = given.model_copy(
        update={
            "compute": given.compute.model_copy(update={"micro_batch": micro_batch, "checkpointing": checkpointing}),
            "qat": given.qat.model_copy(update={"batch_size": 2, "precision": precision, "steps": 2}),
            "decay": given.decay.model_copy(update=phases),
        }
    )
    imports, family = peak_resident_mb(), WanFamily(3.0)
    generator = torch.Generator().manual_seed(0)
    data = LatentDataset(
        torch.randn(4, *CLIP, generator=generator), torch.zeros(4, dtype=torch.int64), ["a"], torch.randn(2, *TEXT)
    )
    teacher = load_transformer(folder, torch.bfloat16 if precision == "bfloat16" else None)
    student = load_transformer(folder)
    prepare_(student, params.effective_scheme, default_targets=family.default_targets)
    add_phi_(student, params.decay.initial_rank, generator)  # from zero: its start has no part in this
    trainer = Trainer(student, teacher, family, data, params)
    trainer.run(2)
    parameters = sum(p.numel() for p in student.parameters())
    peak = peak_resident_mb() - imports
    return {"peak_mb": peak, "parameters": parameters, "bytes_per_parameter": (peak - ACTIVATIONS_MB) * 1e6 / parameters}


def in_fresh_process(folder: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Raises RuntimeError with the process's own words if it fails."""
    command = [sys.executable, "-m", "bench.training_memory", "--measure", str(folder), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {settings} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="of 30")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "SETTINGS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(Path(given.measure[0]), **json.loads(given.measure[1]))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        write_folder(Path(temporary), given.layers)
        print("| training step | peak MB | bytes per parameter, activations apart | budget |\n|---|---|---|---|")
        for name, settings in ROWS.items():
            found = in_fresh_process(Path(temporary), settings)
            budget = BUDGET[settings["precision"]]
            print(f"| {name} | {found['peak_mb']:.0f} | {found['bytes_per_parameter']:.1f} | {budget:.0f} |", flush=True)


if __name__ == "__main__":
    main()
