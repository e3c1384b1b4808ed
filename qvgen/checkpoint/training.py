"""Training state on disk: one safetensors file, enough to continue bit for bit.

Holds the student's tensors (Φ at its current rank included), the optimizer's moments, the averaged weights and the step.
Random numbers need no state: the loop draws them from (seed, step).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from qvgen.nn.swap import qat_layers
from qvgen.phi.auxiliary import replace_parameters
from qvgen.sharded import is_sharded, shared_as
from qvgen.tensors import save_gathered

CODES = "codes"  # of a moment in 8 bits, beside its scale and its qmap


def save_training_state(
    path: str | Path | None,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, torch.Tensor] | None,
    step: int,
) -> None:
    """Write the state beside `path` and rename it, so that a kill at any moment leaves a whole file.

    Of a sharded student all processes call this, the first with a path, the others with None: each tensor is gathered by
    itself, and the file is that of one process.
    """
    names = {id(p): n for n, p in student.named_parameters()}
    tensors = {f"model.{n}": t for n, t in student.state_dict().items()}
    of_phi = _shapes_of_phi(student)
    shapes = {f"model.{n}": shape for n, shape in of_phi.items()}
    for parameter, state in optimizer.state.items():
        if id(parameter) in names:  # not Φ that has decayed away
            name = names[id(parameter)]
            for moment, tensor in state.items():
                tensors |= _plain(f"optimizer.{name}.{moment}", tensor)
                if name in of_phi and tensor.ndim:
                    shapes[f"optimizer.{name}.{moment}"] = of_phi[name]
    tensors |= {f"average.{n}": t for n, t in (average or {}).items()}
    written = {k: v.detach() for k, v in tensors.items()}, {"step": str(step)}, shapes
    if path is None:
        save_gathered(None, *written)
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_gathered(temporary, *written)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@torch.no_grad()
def load_training_state(
    path: str | Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, torch.Tensor] | None,
) -> int:
    """Load into a freshly prepared student and its optimizer; returns the step. Φ is brought to the saved rank. A sharded
    student takes its rows: how many processes wrote the file does not matter.

    Raises ValueError if the file is damaged or belongs to another model or method.
    """
    try:
        with safe_open(path, framework="pt") as file:
            step = int((file.metadata() or {})["step"])
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is not a usable training state ({error}); delete it to start again") from None
    model = _part(tensors, "model.")
    _shape_phi_(student, optimizer, model)
    if mismatch := set(student.state_dict()) ^ set(model):
        raise ValueError(f"{path} is the state of another model: {len(mismatch)} tensors differ, such as {min(mismatch)}")
    state, shapes = student.state_dict(), _shapes_of_phi(student)
    for name, tensor in state.items():
        if model[name].shape != shapes.get(name, tensor.shape):
            raise ValueError(f"{path} is the state of another model: {name} is {list(model[name].shape)} there")
        tensor.copy_(shared_as(tensor, model[name]))
    moments = _part(tensors, "optimizer.")
    if isinstance(optimizer, torch.optim.AdamW) and any(name.endswith(f".{CODES}") for name in moments):
        raise ValueError(f"{path} was written with qat.optimizer: adamw8bit; set that again, or delete it to start again")
    names = {id(p): n for n, p in student.named_parameters()}
    optimizer.state.clear()
    owned = ((p, bool(group.get("fused"))) for group in optimizer.param_groups for p in group["params"])
    for parameter, fused in owned:
        state = _part(moments, f"{names[id(parameter)]}.")
        if state:
            placed = {k: _placed(k, v, parameter, fused) for k, v in state.items()}
            optimizer.state[parameter] = _moments(placed, parameter.dtype)
    saved_average = _part(tensors, "average.")
    if (average is None) != (not saved_average):
        raise ValueError(f"{path} was written with another qat.ema_decay; delete it to start again")
    for name, value in saved_average.items():
        assert average is not None
        average[name].copy_(shared_as(average[name], value))
    return step


def _shapes_of_phi(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of its factors by name, without the zeros that fill sharded ones up."""
    layers = ((name, layer.phi) for name, layer in qat_layers(model) if layer.phi is not None)
    return {f"{name}.phi.{part}": shape for name, phi in layers for part, shape in phi.shapes.items()}


def _plain(name: str, tensor: Any) -> dict[str, torch.Tensor]:
    """A moment by its name, or if it is one of 8 bits (torchao's) the tensors that it consists of."""
    if is_sharded(tensor) or not hasattr(tensor, "__tensor_flatten__"):
        return {name: tensor}
    parts, _ = tensor.__tensor_flatten__()
    return {f"{name}.{part}": getattr(tensor, part) for part in parts}


def _moments(saved: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What `_plain` has taken apart, as the optimizer has it."""
    found = {k: v for k, v in saved.items() if "." not in k}
    for name in (k.removesuffix(f".{CODES}") for k in saved if k.endswith(f".{CODES}")):
        from torchao.optim.subclass_8bit import OptimState8bit  # type: ignore[import-not-found]

        codes, scale, qmap = (saved[f"{name}.{part}"] for part in (CODES, "scale", "qmap"))
        found[name] = OptimState8bit(codes, scale, qmap, signed=bool(qmap.min() < 0), dtype=dtype)
    return found


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _placed(moment: str, value: torch.Tensor, parameter: nn.Parameter, fused: bool) -> torch.Tensor:
    if moment != "step":
        return shared_as(parameter, value)
    # AdamW counts steps on the CPU, but for the fused kernel, which reads the count.
    return value.to(parameter.device if fused else "cpu")


def _shape_phi_(student: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, torch.Tensor]) -> None:
    """Give every Φ the rank it has in the saved state."""
    for name, layer in qat_layers(student):
        up = saved.get(f"{name}.phi.phi_up")
        if layer.phi is None:
            if up is not None:
                raise ValueError(f"the saved state has Φ in layer {name}, this run has none: another method or rank")
        elif up is None:
            replace_parameters(optimizer, layer.phi.truncate(0))
            layer.phi = None
        elif up.shape[1] != layer.phi.rank:
            factors = (part.to(layer.weight.device) for part in (up, saved[f"{name}.phi.phi_down"]))
            replace_parameters(optimizer, layer.phi.assign(*factors))
