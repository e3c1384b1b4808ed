"""`python -m tests.support.device_walk [PART ...]`: the inner functions of every stage on a device that is not the CPU, for
every family and every method that has something of its own there.

Prints a JSON object: what was run -> "" or the error that it ended in.
"""

from __future__ import annotations

import itertools
import json
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from torch import nn

from qvgen.data.latents import LatentDataset
from qvgen.evaluation.quality.modules import module_errors
from qvgen.methods.registry import METHODS
from qvgen.models import cogvideox, wan
from qvgen.models.cogvideox import CogVideoXFamily
from qvgen.models.family import Family
from qvgen.models.wan import WanFamily, image
from qvgen.models.wan.image import WanImageFamily
from qvgen.nn import packed_linear
from qvgen.nn.swap import convert_, prepare_
from qvgen.params import Params, validate_params
from qvgen.quant.grid import LayerGrid, layer_error
from qvgen.sampling.velocities import velocities
from qvgen.training import calibration as calibration_module
from qvgen.training.calibration import apply_folds_, calibrate_
from qvgen.training.loop import Trainer
from tests.support.fake_device import devices, fake_tensors, move_, register
from tests.support.families import KINDS

DEVICE = register()
ROOT = Path(__file__).parents[2]
CLIPS = 2
# The others have nothing of their own that runs on a device: rtn, mse and kd are parts of qvgen, lsq
# one of qdm; dsa and finetune have losses of their own, sums of what all compute.
METHODS_OF = {
    "wan": ("qvgen", "qvgen+", "efficientdm", "svdquant", "viditq", "qdm"),
    "wan_image": ("qvgen",),
    "cogvideox": ("qvgen",),
}
FEW_LAYERS = ["re:.*attn1.to_(q|out.0)"]  # of all methods but qvgen, which runs on all layers


def groups_in_turn() -> Callable[..., Any]:
    """Stands for `timestep_group` in calibration, whose numbers are fake: each batch of one clip is of the next group."""
    batches = itertools.count()

    def group(*_: Any) -> Any:
        members = [next(batches) % CLIPS]
        return SimpleNamespace(tolist=lambda: members)

    return group


def settings(method: str) -> Params:
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    tree["method"] = method
    tree["scheme"]["timestep_groups"] = CLIPS
    tree["scheme"] |= {name: 4 for name in ("input_rotation", "low_rank") if name in METHODS[method].extras}
    tree["calibrate"] |= {
        "batch_size": 1,
        "weight_candidates": 2,
        "clip_candidates": [0.9],
        "tokens_per_group": 16,
    }
    tree["scheme"]["targets"] = [] if method == "qvgen" else FEW_LAYERS
    tree["qat"] |= {"steps": 1, "batch_size": 2, "ema_decay": 0.9}
    tree["decay"] |= {"initial_rank": 2, "phase_steps": 1, "final_steps": 1}
    return validate_params(tree, "walk")


def subject(name: str) -> tuple[Callable[[], nn.Module], Family, LatentDataset]:
    """How a transformer is made, its family, and data on the CPU, where stages keep it."""
    family: Family
    if name == "wan_image":
        family, config = WanImageFamily(3.0), image.TINY_I2V
        latents, text, embeddings = KINDS[name].inputs(CLIPS)
        data = LatentDataset(latents, torch.zeros(CLIPS, dtype=torch.int64), ["a"], text, embeddings)
        return lambda: family.transformer({**config, "num_layers": 1}).eval(), family, data
    if name == "wan":
        family, shape = WanFamily(3.0), (4, 3, 4, 4)
        config = wan.TINY
    else:
        family, shape = CogVideoXFamily({}), (3, 4, 4, 4)
        config = cogvideox.TINY
    data = LatentDataset(torch.randn(CLIPS, *shape), torch.zeros(CLIPS, dtype=torch.int64), ["a"], torch.randn(2, 8, 16))
    return lambda: family.transformer({**config, "num_layers": 1}).eval(), family, data


def walk_method(name: str, method: str) -> None:
    """Stages calibrate, qat, decay and pack, and the velocities of baselines and evaluate."""
    params, (build, family, data) = settings(method), subject(name)
    scheme = params.effective_scheme
    calibration_module.timestep_group = groups_in_turn()
    packed_linear.validate_layer = lambda *_, **__: None  # it reads numbers
    calibration = calibrate_(move_(build(), DEVICE), family, data, params, with_plain=True)
    student, teacher = move_(build(), DEVICE), move_(build(), DEVICE)
    for layer, grid in calibration.grids.items():
        weight = teacher.get_parameter(f"{layer}.weight")
        layer_error(weight, grid, calibration.inputs[layer], scheme)
        layer_error(weight, LayerGrid.min_max(weight, scheme), calibration.inputs[layer], scheme)
        break

    def quantize_(model: nn.Module) -> None:
        apply_folds_(model, family, calibration.folds)
        prepare_(model, scheme, default_targets=family.default_targets, grids=calibration.grids)

    params.chosen.prepare_(student, quantize_, params.decay, torch.Generator().manual_seed(0))
    trainer = Trainer(student, teacher, family, data, params)
    trainer.run(params.schedule.total_steps)
    student = trainer.finish()
    params.chosen.finish_(student, quantize_)
    layers = list(calibration.grids)
    timesteps = torch.tensor([900.0, 20.0])
    module_errors(
        teacher, student, family, data.latents, data.text(torch.arange(CLIPS)), timesteps, layers, seed=0, image=data.image
    )
    convert_(student)
    predicted = velocities(
        student,  # type: ignore[arg-type]
        family,
        data.latents,
        data.text(torch.arange(CLIPS)),
        [50.0],
        seed=0,
        batch_size=1,
        image=data.image,
    )
    assert predicted.device.type == "cpu", predicted.device
    assert devices(student) == devices(teacher) == {DEVICE.type}


def walk_vae(name: str) -> None:
    """Stage prepare's latents and evaluation's clips."""
    family = subject(name)[1]
    with torch.device("cpu"):
        pipeline = type(family).tiny_pipeline()
    move_(pipeline.vae, DEVICE)
    facts: dict[str, Any] = {"vae": pipeline.vae, "transformer": pipeline.transformer}
    if name == "cogvideox":
        names = ("vae_scaling_factor_image", "vae_scale_factor_temporal", "decode_latents")
        facts |= {name: getattr(pipeline, name) for name in names}
    used = SimpleNamespace(**facts)
    latents = family.encode_clips(used, torch.randn(1, 3, 9, 32, 32))
    clips = family.decode_latents(used, latents.cpu(), 9)
    assert latents.device.type == clips.device.type == DEVICE.type


def walk_text(name: str) -> None:
    """Stage prepare's text embeddings."""
    family = subject(name)[1]
    pipeline = type(family).tiny_pipeline()
    move_(pipeline.text_encoder, DEVICE)
    assert family.encode_text(pipeline, ["a red ball"], 8).device.type == DEVICE.type


def mixed_devices() -> None:
    """What must fail, for the rest to mean anything."""
    torch.ones(2) + torch.ones(2, device=DEVICE)


def summary(error: Exception) -> str:
    """The error and the last lines of ours that led to it."""
    ours = [f"{f.filename}:{f.lineno} {f.line}" for f in traceback.extract_tb(error.__traceback__) if "/qvgen/" in f.filename]
    last = traceback.extract_tb(error.__traceback__)[-1]
    first = str(error).partition("\n")[0]
    return "\n".join([*ours[-3:], f"{last.filename}:{last.lineno} {last.line}", f"{type(error).__name__}: {first:.300}"])


def main(wanted: Collection[str] = ()) -> dict[str, str]:
    parts: dict[str, Callable[[], None]] = {"mixed devices": mixed_devices}
    for name, methods in METHODS_OF.items():
        for method in methods:
            parts[f"{name} {method}"] = lambda name=name, method=method: walk_method(name, method)
    for name in ("wan", "cogvideox"):
        parts[f"{name} vae"] = lambda name=name: walk_vae(name)
        parts[f"{name} text"] = lambda name=name: walk_text(name)
    found = {}
    for part, run in parts.items():
        if wanted and part not in wanted:
            continue
        try:
            with fake_tensors(), torch.device("cpu"):
                run()
            found[part] = ""
        except Exception as error:
            found[part] = summary(error)
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
