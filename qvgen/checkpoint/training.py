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
from qvgen.tensors import save_tensors

CODES = "codes"  # of a moment in 8 bits, beside its scale and its qmap


def save_training_state(
    path: str | Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, torch.Tensor] | None,
    step: int,
) -> None:
    """Write the state beside `path` and rename it, so that a kill at any moment leaves a whole file."""
    path = Path(path)
    names = {id(p): n for n, p in student.named_parameters()}
    tensors = {f"model.{n}": t for n, t in student.state_dict().items()}
    for parameter, state in optimizer.state.items():
        if id(parameter) in names:  # not Φ that has decayed away
            for moment, tensor in state.items():
                tensors |= _plain(f"optimizer.{names[id(parameter)]}.{moment}", tensor)
    tensors |= {f"average.{n}": t for n, t in (average or {}).items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_tensors(temporary, {k: v.detach() for k, v in tensors.items()}, metadata={"step": str(step)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_training_state(
    path: str | Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, torch.Tensor] | None,
) -> int:
    """Load into a freshly prepared student and its optimizer; returns the step. Φ is brought to the saved rank.

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
    student.load_state_dict(model)
    moments = _part(tensors, "optimizer.")
    if isinstance(optimizer, torch.optim.AdamW) and any(name.endswith(f".{CODES}") for name in moments):
        raise ValueError(f"{path} was written with qat.optimizer: adamw8bit; set that again, or delete it to start again")
    names = {id(p): n for n, p in student.named_parameters()}
    optimizer.state.clear()
    owned = ((p, bool(group.get("fused"))) for group in optimizer.param_groups for p in group["params"])
    for parameter, fused in owned:
        state = _part(moments, f"{names[id(parameter)]}.")
        if state:
            placed = {k: v.to(_device(k, parameter, fused)) for k, v in state.items()}
            optimizer.state[parameter] = _moments(placed, parameter.dtype)
    saved_average = _part(tensors, "average.")
    if (average is None) != (not saved_average):
        raise ValueError(f"{path} was written with another qat.ema_decay; delete it to start again")
    for name, value in saved_average.items():
        assert average is not None
        average[name].copy_(value)
    return step


def _plain(name: str, tensor: Any) -> dict[str, torch.Tensor]:
    """A moment by its name, or if it is one of 8 bits (torchao's) the tensors that it consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
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


def _device(moment: str, parameter: nn.Parameter, fused: bool) -> torch.device:
    # AdamW counts steps on the CPU, but for the fused kernel, which reads the count.
    return torch.device("cpu") if moment == "step" and not fused else parameter.device


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
