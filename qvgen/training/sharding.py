"""One model over all processes of training, by PyTorch's FSDP2: each holds some rows of every tensor, and of the optimizer's
moments; a block is gathered while it computes, and its gradients are averaged and shared out as they are made.

Not FSDP's mixed precision: it would round scales and clips to 16 bits, and the trained grid would be another than the packed
one. Autocast computes in bfloat16 as in one process, from weights that are gathered in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.func import functional_call

from qvgen.nn.swap import qat_layers
from qvgen.phi.auxiliary import AuxiliaryModule
from qvgen.sharded import whole
from qvgen.training.ranks import Ranks


def shard_(model: nn.Module, ranks: Ranks) -> None:
    """Leave each of the `ranks` its rows of every parameter, on its device; `model`, on any device, is the same in all.

    Units are the blocks, the members of the model's lists, and the rest. Before: what trains must be known, and Φ attached.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Nothing writes into what a model returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    blocks = [block for part in model.children() if isinstance(part, nn.ModuleList) for block in part]
    for unit in (*blocks, model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


@torch.no_grad()
def start_phi_(model: nn.Module, agree: Callable[[Sequence[torch.Tensor]], None]) -> None:
    """Start the Φ of a sharded model from the weight error, one layer at a time. `agree`: makes tensors those of the first
    process, since another device may choose other signs."""
    for _, layer in qat_layers(model):
        if layer.phi is not None:
            weight, quantizer = whole(layer.weight), layer.weight_quantizer
            grid = {name: whole(part) for name, part in quantizer.named_parameters()}
            start = AuxiliaryModule.from_weight_error(weight - functional_call(quantizer, grid, weight), layer.phi.rank)
            agree((start.phi_up, start.phi_down))
            layer.phi.assign(start.phi_up, start.phi_down)
