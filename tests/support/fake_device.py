"""A device that is not the CPU, on a machine without one: whatever mixes devices fails, as it would on a GPU.

PyTorch lets Python register a backend ("fakegpu") in the place kept for devices outside its tree, and fake tensors carry
shape, dtype and device but no numbers. Together they run every line of a model, its training and its calibration, and raise
where an operation gets tensors of two devices. Values that the code asks for (`.tolist()`, `float(...)`) are made up.

It changes the process it is loaded in, so it runs in one of its own: tests/support/device_walk.py. The functions of torch that
it uses are private; tests/integration/test_other_device.py checks that mixing devices is still noticed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fakegpu"


def register() -> torch.device:
    """The device, from now on known to this process."""
    _setup_privateuseone_for_python_backend(NAME)
    torch._C._set_only_lift_cpu_tensors(True)
    made_up: dict[str, Any] = {
        "tolist": _zeros,
        "item": lambda self: 0.5 if self.is_floating_point() else 0,
        "__float__": lambda self: 0.5,
        "__int__": lambda self: 1,
        "__index__": lambda self: 1,
        "__bool__": lambda self: True,
    }
    for name, function in made_up.items():
        setattr(FakeTensor, name, function)
    return torch.device(NAME)


def _zeros(tensor: torch.Tensor) -> Any:
    if tensor.ndim == 0:
        return 0.0 if tensor.is_floating_point() else 0
    return [_zeros(part) for part in tensor.unbind()]


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Every tensor made inside is fake."""
    from qvgen.quant import rotation

    rotation._hadamard.cache_clear()  # what it kept belongs to another mode
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        mode.may_turn_const = lambda t: False  # type: ignore[method-assign]  (it would compute with real tensors of the device)
        with mode:
            yield
    finally:
        rotation._hadamard.cache_clear()


def move_(model: nn.Module, device: torch.device) -> Any:
    """`model.to(device)`, which cannot replace fake parameters."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                moved = nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
                module._parameters[name] = moved
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model


def devices(model: nn.Module) -> set[str]:
    """Of its parameters and buffers."""
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
