"""`python -m bench.training_bytes`: bytes a parameter that training keeps: student, gradients, moments and teacher, counted as
they lie in memory after a step, activations and temporaries apart.

The transformer has the published config of Wan 2.1 1.3B but few layers, random weights, and Φ; a small clip is enough, because
none of this depends on it. adamw8bit needs torchao (docs/scale.md).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.report import print_table
from qvgen.checkpoint.pipeline import load_transformer
from qvgen.data.latents import LatentDataset
from qvgen.device import resolve_device
from qvgen.models.wan import WAN_2_1_1_3B, WanFamily
from qvgen.nn.swap import add_phi_, prepare_
from qvgen.params import Params, validate_params
from qvgen.training.loop import Trainer

ROOT = Path(__file__).resolve().parents[1]
OPTIMIZERS, PRECISIONS = ("adamw", "adamw8bit"), ("float32", "bfloat16")
PARTS = ("student", "gradients", "moments", "teacher")


def settings(optimizer: str, precision: str, rank: int) -> Params:
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    tree["compute"]["processes"] = 1
    tree["qat"] |= {"steps": 1, "batch_size": 1, "optimizer": optimizer, "precision": precision}
    tree["decay"] |= {"initial_rank": rank}
    return validate_params(tree, "params.yaml")


def measure(folder: Path, params: Params) -> dict[str, float]:
    """Bytes of each of PARTS over the parameters of the transformer in `folder`, which teacher and student are loaded from as
    stages load them."""
    dtype = getattr(torch, params.qat.precision)
    teacher, student = (load_transformer(folder, each, resolve_device("auto")) for each in (dtype, torch.float32))
    prepare_(student, params.effective_scheme, default_targets=WanFamily().default_targets)
    add_phi_(student, params.decay.initial_rank)
    config: Any = teacher.config
    data = LatentDataset(
        torch.randn(1, config.in_channels, 1, 8, 8), torch.zeros(1).long(), ["a"], torch.randn(2, 8, config.text_dim)
    )
    trainer, found = Trainer(student, teacher, WanFamily(), data, params), {}

    def count(optimizer: torch.optim.Optimizer, *_: object) -> None:
        moments = [x for state in optimizer.state.values() for x in state.values()]
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        tensors = ([*student.parameters(), *student.buffers()], gradients, moments, [*teacher.parameters()])
        found.update(zip(PARTS, map(held, tensors), strict=True))

    trainer.optimizer.register_step_post_hook(count)
    with torch.compiler.set_stance("force_eager"):  # it holds the same, and compiling torchao's step takes minutes
        trainer.run(1)
    return {part: size / sum(p.numel() for p in teacher.parameters()) for part, size in found.items()}


def write_model(folder: Path, config: Mapping[str, Any]) -> None:
    """What `load_transformer` reads of a pipeline folder."""
    torch.manual_seed(0)
    transformer: Any = WanFamily.transformer(config)
    transformer.save_pretrained(folder / "transformer")
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))


def held(tensors: list[Any]) -> int:
    """Bytes of tensors, of those that consist of others (8-bit moments) the bytes of these."""
    plain, todo = [], list(tensors)
    while todo:
        tensor = todo.pop()
        if hasattr(tensor, "__tensor_flatten__"):
            todo += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        else:
            plain.append(tensor)
    return sum(x.numel() * x.element_size() for x in {x.data_ptr() or id(x): x for x in plain}.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training_bytes", description="bytes a parameter that training keeps"
    )
    parser.add_argument("--layers", type=int, default=1, help="of the transformer; default 1")
    parser.add_argument("--rank", type=int, default=32, help="of Φ; default 32")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="only this one")
    parser.add_argument("--precision", choices=PRECISIONS, help="only this one")
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder, {**WAN_2_1_1_3B, "num_layers": options.layers})
        for precision in [options.precision] if options.precision else PRECISIONS:
            for optimizer in [options.optimizer] if options.optimizer else OPTIMIZERS:
                found = measure(folder, settings(optimizer, precision, options.rank))
                rows.append([precision, optimizer, *(f"{found[part]:.2f}" for part in PARTS), f"{sum(found.values()):.2f}"])
    print_table("Bytes a parameter", ["precision", "optimizer", *PARTS, "together"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
