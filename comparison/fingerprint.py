"""How each method behaves: a few steps of it, from calibration to the packed model, on two-layer models of both families.

    python -m comparison.fingerprint            # which methods behave otherwise than comparison/fingerprints.json says
    python -m comparison.fingerprint --record   # write what they do now

Results depend on the code through this file alone. A rename, a move or a comment moves no fingerprint; a test recomputes all
of them and names the cases whose method has moved. Then either the change was not meant, or the method's revision in
comparison/params.yaml is raised, so that its cases run again, and the fingerprints are recorded anew.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparison.cases import FOLDER
from qvgen.methods.registry import METHODS
from qvgen.params import Params, validate_params
from stages.runtime.outputs import write_whole

if TYPE_CHECKING:
    from qvgen.training.recipe import Sources

FILE = FOLDER / "fingerprints.json"
FAMILIES = ("wan", "cogvideox")
# Relative. Rounding to a grid turns the last digit of a sum, which another instruction set changes, into 4 % of a trained
# error; into 0.01 % of what is not trained or is a mean over a whole model (LOG.md).
TOLERANCE, ERROR_TOLERANCE = 1e-3, 0.1
TRAINED_ERRORS = ("final_loss", "velocity_mse", "psnr_db")
Fingerprint = dict[str, dict[str, float]]  # family -> measure -> value

CLIPS = 6
# Of its own, so that an edit to params.yaml moves nothing. Whatever a method does at all it does here at least once.
SETTINGS: dict[str, Any] = {
    "seed": 0,
    "fetch": {"source": "tiny"},
    "prepare": {
        **{"source": "digits", "frames": 9, "height": 32, "width": 32, "max_sequence_length": 8},
        **{
            "train_clips": CLIPS,
            "calibration_clips": CLIPS,
            "held_out_clips": CLIPS,
            "batch_size": CLIPS,
            "shard_size": CLIPS,
        },
    },
    "scheme": {
        "weights": {"num_bits": 3, "symmetric": False, "strategy": "channel", "zero_point_domain": "float"},
        "input_activations": {"num_bits": 4, "symmetric": False, "strategy": "token"},
        "timestep_groups": 2,
    },
    "calibrate": {
        **{"batch_size": CLIPS, "mse_exponent": 2.4, "weight_candidates": 40},
        **{"clip_candidates": [0.99, 0.9, 0.8, 0.7, 0.6, 0.5], "tokens_per_group": 32},
    },
    "qat": {
        **{"steps": 2, "batch_size": 4, "learning_rate": 4e-3, "quantizer_learning_rate": 2e-4, "clip_learning_rate": 3e-2},
        **{"betas": [0.9, 0.95], "weight_decay": 1e-4, "warmup_fraction": 0.0, "final_learning_rate": 0.05},
        **{"max_grad_norm": 1.0, "caption_dropout": 0.25, "checkpoint_every": 100},
    },
    "decay": {"initial_rank": 2, "decay_ratio": 0.5, "annealing": "cosine", "phase_steps": 2, "final_steps": 1},
    "pack": {"dtype": "bfloat16"},
    "evaluate": {
        **{"prompts": 2, "inference_steps": 2, "guidance_scale": 3.0, "batch_size": 4, "velocity_timesteps": 2, "videos": 0},
    },
    "benchmark": {"repetitions": 3, "batch_size": 1},
    "register": {"name": "tiny"},
    "flow": {"runner": "threads", "workers": 1, "schedule": "0 3 * * *", "timezone": "UTC"},
    "gate": {"rules": {"velocity_mse": {"metric": "packed.velocity_mse", "max": 1.0}}, "champion": {}},
}


def read_fingerprints(root: Path) -> dict[str, Fingerprint]:
    """{method: {family: {measure: value}}} as recorded."""
    return json.loads((root / FILE).read_text())


def measure_all() -> dict[str, Fingerprint]:
    """The measures of every method as it behaves now. Takes twenty seconds on one core."""
    found: dict[str, Fingerprint] = {method: {} for method in METHODS}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            sources = write_sources(family, Path(folder))
            for method in METHODS:
                found[method][family] = measure_method(method, sources)
    return found


def moved(before: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint]) -> dict[str, list[str]]:
    """{method: what has moved by more than its tolerance, such as "wan.first_loss: 0.5, now 0.6"}, for those that moved."""
    found: dict[str, list[str]] = {}
    for method in sorted({*before, *now}):
        old, new = (_flat(side.get(method, {})) for side in (before, now))
        lines = [
            f"{name}: {old.get(name)}, now {new.get(name)}"
            for name in sorted({*old, *new})
            if name not in old or name not in new or not _close(name, old[name], new[name])
        ]
        if lines:
            found[method] = lines
    return found


def write_sources(family: str, folder: Path) -> Sources:
    """A tiny model and invented data: latents and text embeddings are noise, which is enough to move by."""
    import torch

    from qvgen.data.latents import save_text
    from qvgen.models.tiny import TINY_PROMPT, tiny_pipeline
    from qvgen.tensors import save_tensors
    from qvgen.training.recipe import Sources

    model = tiny_pipeline(family, folder / "model")
    shape = (CLIPS, 4, 3, 4, 4) if family == "wan" else (CLIPS, 3, 4, 4, 4)
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "calibration", "held_out"):
        (folder / "data" / part).mkdir(parents=True)
        tensors = {"latents": torch.randn(shape, generator=generator), "caption_index": torch.arange(CLIPS) % 2}
        save_tensors(folder / "data" / part / "shard-00000.safetensors", tensors)
    captions = [TINY_PROMPT, "a blue digit one moving left"]
    (folder / "data/captions.json").write_text(json.dumps(captions))
    embeddings = torch.randn((len(captions) + 1, 8, 16), generator=generator)
    save_text(folder / "data/text/shard-00000.safetensors", embeddings.unbind())
    return Sources(model, folder / "calibration", folder / "data")


def measure_method(method: str, sources: Sources) -> dict[str, float]:
    """Loss of the first and the last step; scores of the packed model against full precision; its tensors, summed up."""
    import torch

    from comparison.case import train
    from qvgen.checkpoint.packed import export_pipeline
    from qvgen.checkpoint.pipeline import load_pipeline
    from qvgen.data.latents import LatentDataset
    from qvgen.evaluation.quality.trial import Trial, compare, observe
    from qvgen.models.registry import load_family
    from qvgen.nn.swap import convert_
    from qvgen.training.recipe import calibrate

    params = tiny_params(method)
    losses: list[float] = []
    calibrate(params, sources)
    _, student = train(params, sources, lambda _, record: losses.append(record.loss))
    convert_(student)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "packed"
        export_pipeline(sources.model, student, params.effective_scheme, folder, torch.bfloat16, method)
        trial = Trial.from_params(params, LatentDataset.open(sources.data / "held_out"))
        family = load_family(folder)
        stop = params.chosen.guidance_stop if family.guidance_can_stop else 1.0
        seen = observe(load_pipeline(folder), family, trial, stop)
        scores = compare(observe(load_pipeline(sources.model), family, trial), seen, trial)
        summary = packed_summary(folder / "transformer")
    kept = {name: scores[name] for name in ("velocity_mse", "psnr_db")}
    found = ({"first_loss": losses[0], "final_loss": losses[-1]} if losses else {}) | kept | summary
    return {name: float(f"{value:.7g}") for name, value in found.items()}


def packed_summary(transformer: Path) -> dict[str, float]:
    """Summary of the packed tensors: bytes, share of the codes' bits that are 1, mean magnitudes of scales, zero points and
    clips. A hash would differ from machine to machine."""
    import torch
    from safetensors.torch import load_file

    kinds: dict[str, list[torch.Tensor]] = {}
    for path in sorted(transformer.glob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            kinds.setdefault(name.rpartition(".")[2], []).append(tensor)
    packed = {kind: torch.cat([t.flatten() for t in found]) for kind, found in kinds.items()}
    codes = packed["weight_packed"]
    ones = sum(float(((codes >> bit) & 1).double().mean()) for bit in range(32)) / 32
    means = {
        f"mean_{kind}": float(packed[kind].double().abs().mean())
        for kind in ("weight_scale", "weight_zero_point", "input_clip_lower", "input_clip_upper")
        if kind in packed
    }
    size = sum(t.numel() * t.element_size() for t in packed.values())
    return {"packed_bytes": float(size), "share_of_ones": ones, **means}


def tiny_params(method: str) -> Params:
    """SETTINGS; rotations are as small as the layers."""
    rotation = {"input_rotation": 4} if "input_rotation" in METHODS[method].extras else {}
    settings = {"method": method, "scheme": SETTINGS["scheme"] | rotation}
    return validate_params(SETTINGS | settings, "comparison/fingerprint.py")


def _close(name: str, old: float, new: float) -> bool:
    trained_error = name.rpartition(".")[2] in TRAINED_ERRORS
    return math.isclose(old, new, rel_tol=ERROR_TOLERANCE if trained_error else TOLERANCE)


def _flat(fingerprint: Fingerprint) -> dict[str, float]:
    return {f"{family}.{name}": value for family, found in fingerprint.items() for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Which methods behave otherwise than recorded.")
    parser.add_argument("--record", action="store_true", help=f"write {FILE}")
    record = parser.parse_args().record
    now = measure_all()
    if record:
        lines = [f" {json.dumps(method)}: {json.dumps(found)}" for method, found in now.items()]
        with write_whole(Path.cwd() / FILE) as path:
            path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return
    found = moved(read_fingerprints(Path.cwd()), now)
    for method, lines in found.items():
        print(f"{method}: {'; '.join(lines)}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
