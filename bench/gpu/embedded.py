"""`python -m bench.gpu.embedded`: the embedded model from calibration to evaluation on a GPU.

Calibration, training, rank decay, packing, velocities: the inner functions of the stages, with params.yaml's settings cut
to a few steps, and random latents instead of encoded digits. It shows whether everything runs on the device and the packed
model computes there what it computes on the CPU. Neither the orchestrator nor the trackers are needed. What it takes is the
time of this short run, not that of `make repro`.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.gpu.timing import device_of
from bench.report import print_table, write_json
from qvgen.checkpoint.pipeline import load_transformer
from qvgen.data.latents import LatentDataset
from qvgen.models.registry import load_family
from qvgen.nn.packed_linear import packed_layers
from qvgen.nn.swap import convert_, prepare_
from qvgen.params import Params, validate_params
from qvgen.sampling.velocities import velocities
from qvgen.training.calibration import apply_folds_, calibrate_
from qvgen.training.loop import Trainer

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "assets/tiny-wan"
CLIPS = 4
# Of packed velocities on two devices: float32 sums in another order move a few codes at ties.
AGREEMENT = 0.02


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.embedded", description="the embedded model on a GPU")
    parser.add_argument("--device", type=device_of, default="cuda")
    parser.add_argument("--json")
    options = parser.parse_args(arguments)
    content = run(options.device, settings(str(options.device)))
    rows = [[name, f"{seconds:.2f}"] for name, seconds in content["stage_seconds"].items()]
    print_table(f"the embedded model on {options.device}, a few steps", ["", "s"], rows)
    print(f"packed velocities against the CPU's: {content['difference']:.1e} (limit {AGREEMENT:.0e})")
    print(f"kernels {content['backend']}")
    if options.json:
        write_json(options.json, content)
    return 0 if content["difference"] < AGREEMENT else 1


def settings(device: str) -> Params:
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    tree["scheme"]["timestep_groups"] = 2
    tree["compute"]["device"] = device
    tree["calibrate"] |= {"batch_size": 2, "weight_candidates": 4, "clip_candidates": [0.9, 0.95], "tokens_per_group": 64}
    tree["qat"] |= {"steps": 2, "batch_size": 2}
    tree["decay"] |= {"initial_rank": 2, "phase_steps": 1, "final_steps": 1}
    return validate_params(tree, "bench.gpu.embedded")


def run(device: torch.device, params: Params) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def done(name: str) -> None:
        nonlocal started
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[name], started = time.perf_counter() - started, time.perf_counter()

    family, scheme = load_family(MODEL), params.effective_scheme

    def load() -> Any:
        return load_transformer(MODEL, torch.float32, device)

    student, teacher, generator = load(), load(), torch.Generator().manual_seed(0)
    config = student.config
    latents = torch.randn(CLIPS, config["in_channels"], 3, 4, 4, generator=generator)
    text = torch.randn(2, 8, config["text_dim"], generator=generator)
    data = LatentDataset(latents, torch.zeros(CLIPS, dtype=torch.int64), ["a"], text)
    done("load")
    calibration = calibrate_(load(), family, data, params)
    done("calibrate")

    def quantize_(model: Any) -> None:
        apply_folds_(model, family, calibration.folds)
        prepare_(model, scheme, default_targets=family.default_targets, grids=calibration.grids)

    params.chosen.prepare_(student, quantize_, params.decay, generator)
    trainer = Trainer(student, teacher, family, data, params)
    trainer.run(params.schedule.total_steps)
    student = trainer.finish()
    params.chosen.finish_(student, quantize_)
    done("train")
    convert_(student)
    done("pack")
    embeddings, timesteps = data.text(torch.arange(CLIPS)), [50.0, 650.0]
    on_cpu: Any = copy.deepcopy(student).to("cpu")

    def predict(model: Any) -> torch.Tensor:
        return velocities(model, family, latents, embeddings, timesteps, seed=0, batch_size=CLIPS).float().cpu()

    predicted = predict(student)
    done("evaluate")
    expected = predict(on_cpu)
    difference = float((predicted - expected).norm() / expected.norm())
    return {
        "summary": f"calibrated, trained, packed; velocities differ from the CPU's by {difference:.1e}",
        "device": str(device),
        "stage_seconds": seconds,
        "difference": difference,
        "backend": "+".join(sorted({str(layer.backend) for _, layer in packed_layers(student)})),
    }


if __name__ == "__main__":
    sys.exit(main())
