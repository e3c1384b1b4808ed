"""Which backend runs which op, and why: availability with reasons. A packed layer's backend is chosen once, when it is loaded;
an op between layers (block_ops.py) has no state, and its backend is chosen for each call.

`auto` takes the fastest backend that can run a layer and says once, in the log, which one and why no faster one did. Asking
for a backend by name, with the environment variable QVGEN_KERNELS or in code, never falls back: it raises.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

import torch

from qvgen.quant.scheme import QuantArgs

ENVIRONMENT = "QVGEN_KERNELS"
OP = "quantized_linear"
BLOCK_OPS = ("layer_norm_modulate", "rms_norm_rotary", "add_gated", "attention", "attention_int8")
_log = logging.getLogger(__name__)


class KernelPreference(StrEnum):
    AUTO = "auto"
    REFERENCE = "reference"
    CPU = "cpu"
    TRITON = "triton"


class PackedWeight(NamedTuple):
    """A layer's weight as it is stored (packing/layout.py): what a backend decides on and prepares."""

    words: torch.Tensor  # (N, ceil(K num_bits / 32)) int32
    scale: torch.Tensor  # (N or 1, G) float32
    zero_point: torch.Tensor | None  # (N or 1, G) float32
    row_sum: torch.Tensor  # (N, G) int32
    in_features: int
    args: QuantArgs
    activations: QuantArgs | None


class PreparedWeight(NamedTuple):
    """A layer's weight as `backend` wants it; `weight` has that backend's own layout, the rest the op's."""

    backend: str
    weight: torch.Tensor
    scale: torch.Tensor  # (N, G) float32
    zero_point: torch.Tensor | None  # (N, G) float32
    row_sum: torch.Tensor  # (N, G) int32


class LayerTensors(NamedTuple):
    """A layer's tensors as the ops get them (kernels/linear_ops.py)."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor | None
    weight_row_sum: torch.Tensor
    clip_lower: torch.Tensor | None
    clip_upper: torch.Tensor | None
    bias: torch.Tensor | None


class Arguments(NamedTuple):
    """Arguments of the ops that are the same for all layers of a call."""

    timestep_group: torch.Tensor | None
    weight_bits: int
    activation_bits: int | None
    activation_symmetric: bool
    backend: str


class BlockOp(NamedTuple):
    """A backend's version of one of BLOCK_OPS; arguments and result as block_ops.py has them."""

    run: Callable[..., torch.Tensor]
    missing: Callable[[], str] = lambda: ""  # why this machine cannot run it, worded for a user; empty if it can
    takes: Callable[..., bool] = lambda *_: True  # whether it can run these arguments: their dtypes and sizes
    limits: Callable[[], str] = lambda: ""  # what it leaves to others on this machine, and why; empty: nothing


class Backend(Protocol):
    name: str
    devices: tuple[str, ...]  # device types it is made for; empty: all
    block_ops: Mapping[str, BlockOp]  # those of BLOCK_OPS that it has

    def available(self) -> str:
        """Why it cannot run on this machine, worded for a user; empty if it can."""
        ...

    def supports(self, layer: PackedWeight) -> str:
        """Why it cannot run this layer; empty if it can."""
        ...

    def slower(self, layer: PackedWeight) -> str:
        """Why `auto` passes it over although it can run this layer; empty if it does not."""
        ...

    def prepare(self, layer: PackedWeight) -> PreparedWeight:
        """Repack a stored weight, on its device. May be slow: happens once, at load."""
        ...

    def stored_words(self, prepared: PreparedWeight, in_features: int, num_bits: int) -> torch.Tensor:
        """Inverse of `prepare`: PackedWeight.words, bit for bit. Layers keep the prepared weight only."""
        ...

    def linear(
        self,
        x: torch.Tensor,
        layers: Sequence[LayerTensors],
        arguments: Arguments,
        outputs: Sequence[torch.Tensor],
        gelu: bool,
    ) -> None:
        """Write each layer's output, in the dtype it has, to `outputs`."""
        ...

    def feed_forward(
        self, x: torch.Tensor, up: LayerTensors, down: LayerTensors, arguments: Arguments, output: torch.Tensor
    ) -> None:
        """down(gelu(up(x))), the intermediate rounded to the dtype of x."""
        ...


class NotBuilt:
    """Stands for a backend that this installation does not have."""

    block_ops: Mapping[str, BlockOp] = {}

    def __init__(self, name: str, devices: tuple[str, ...], reason: str) -> None:
        self.name, self.devices, self.reason = name, devices, reason

    def available(self) -> str:
        return self.reason

    def supports(self, layer: PackedWeight) -> str:
        return ""

    def slower(self, layer: PackedWeight) -> str:
        return ""

    def prepare(self, layer: PackedWeight) -> PreparedWeight:
        raise RuntimeError(f"backend {self.name} is not available: {self.reason}")

    def stored_words(self, *_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError(f"backend {self.name} is not available: {self.reason}")

    def linear(self, *_: Any, **__: Any) -> None:
        raise RuntimeError(f"backend {self.name} is not available: {self.reason}")

    def feed_forward(self, *_: Any, **__: Any) -> None:
        raise RuntimeError(f"backend {self.name} is not available: {self.reason}")


class KernelRow(NamedTuple):
    """One line of `qvgen kernels`."""

    op: str
    backend: str
    available: bool
    reason: str  # why it is not available, or not used, or not for all; empty otherwise
    chosen: bool


# Fastest first, which is the order in which `auto` tries them.
_backends: dict[str, Backend] = {
    "triton": NotBuilt("triton", ("cuda",), "this version of qvgen has no GPU kernels"),
    "cpu": NotBuilt("cpu", ("cpu",), "this version of qvgen has no compiled CPU kernels"),
}
_announced: set[str] = set()


def register(backend: Backend) -> None:
    """Make a backend known under its name. Raises ValueError for a name that KernelPreference does not have."""
    if backend.name not in set(KernelPreference) - {KernelPreference.AUTO}:
        raise ValueError(f"backend {backend.name!r} is not one of {', '.join(KernelPreference)}")
    _backends[backend.name] = backend


def backends() -> list[Backend]:
    """Every backend, fastest first."""
    return list(_backends.values())


def get(name: str) -> Backend:
    """Raises ValueError for a name that no backend has."""
    backend = _backends.get(name)
    if backend is None:
        raise ValueError(f"kernel backend {name!r} is not one of {', '.join(_backends)}")
    return backend


def preference() -> KernelPreference:
    """What QVGEN_KERNELS asks for; auto if it is not set. Raises ValueError for an unknown name."""
    value = os.environ.get(ENVIRONMENT)
    if not value:
        return KernelPreference.AUTO
    try:
        return KernelPreference(value)
    except ValueError:
        raise ValueError(f"{ENVIRONMENT}={value!r} is not one of {', '.join(KernelPreference)}") from None


def choose(layer: PackedWeight, wanted: KernelPreference | None = None) -> Backend:
    """The backend for a layer: `wanted`, or what QVGEN_KERNELS asks for.

    Raises RuntimeError if a backend asked for by name cannot run the layer.
    """
    wanted = preference() if wanted is None else wanted
    device = layer.words.device
    if wanted is not KernelPreference.AUTO:
        backend = _backends[wanted]
        if reason := _refusal(backend, device) or backend.supports(layer):
            raise RuntimeError(
                f"kernel backend {wanted.value!r} was asked for and cannot run: {reason}; "
                f"unset {ENVIRONMENT} to let qvgen choose ({ENVIRONMENT}=auto)"
            )
        return backend
    passed_over = []
    for backend in _backends.values():
        if not _serves(backend, device):
            continue
        if not (reason := backend.available() or backend.supports(layer) or backend.slower(layer)):
            _announce(backend, device, passed_over)
            return backend
        passed_over.append(f"{backend.name}: {reason}")
    raise RuntimeError(f"no kernel backend can run packed layers on {device.type}: {'; '.join(passed_over)}")


def block_op(name: str, arguments: Sequence[Any]) -> Callable[..., torch.Tensor]:
    """The function that runs one of BLOCK_OPS on these arguments, whose first is a tensor: that of the fastest backend that
    takes them. What QVGEN_KERNELS asks for comes first, but the reference runs what that backend does not take.

    Raises RuntimeError if a backend asked for by name has the op and cannot run on this machine.
    """
    wanted, device, reason = preference(), arguments[0].device.type, ""
    for backend in _backends.values():
        op = backend.block_ops.get(name)
        if op is None:
            continue
        if wanted is not KernelPreference.AUTO and backend.name not in (wanted, KernelPreference.REFERENCE):
            continue
        if backend.devices and device not in backend.devices:
            continue
        if reason := op.missing():
            if wanted == backend.name and (broken := backend.available()):
                raise RuntimeError(f"{ENVIRONMENT}={wanted} asks for kernels that cannot run: {broken}")
            continue
        if op.takes(*arguments):
            return op.run
    raise RuntimeError(f"no kernel backend can run {name} on {device}: {reason or 'none has it'}")


def explain(device: torch.device | str = "cpu") -> list[KernelRow]:
    """Every op and backend that has it, and which one tensors on `device` get (unless their shape, bits or dtype rule it
    out)."""
    device, wanted = torch.device(device), preference()
    refusals = {name: _refusal(backend, device) for name, backend in _backends.items()}
    rows = _rows(OP, refusals, [wanted.value] if wanted is not KernelPreference.AUTO else list(_backends))
    for op in BLOCK_OPS:
        having = {name: backend for name, backend in _backends.items() if op in backend.block_ops}
        reasons = {name: backend.block_ops[op].missing() or _refusal(backend, device) for name, backend in having.items()}
        auto = wanted is KernelPreference.AUTO
        of_op = _rows(op, reasons, list(having) if auto else [wanted.value, KernelPreference.REFERENCE.value])
        rows += [row if row.reason else row._replace(reason=having[row.backend].block_ops[op].limits()) for row in of_op]
    return rows


def _rows(op: str, refusals: Mapping[str, str], candidates: Sequence[str]) -> list[KernelRow]:
    chosen = next((name for name in candidates if not refusals.get(name, "not here")), None)
    rows = []
    for name, reason in refusals.items():
        missing = _backends[name].available() or (op in BLOCK_OPS and _backends[name].block_ops[op].missing())
        rows.append(KernelRow(op, name, not missing, reason, name == chosen))
    return rows


def _serves(backend: Backend, device: torch.device) -> bool:
    return not backend.devices or device.type in backend.devices


def _refusal(backend: Backend, device: torch.device) -> str:
    if reason := backend.available():
        return reason
    return "" if _serves(backend, device) else f"runs on {', '.join(backend.devices)} only, not on {device.type}"


def _announce(backend: Backend, device: torch.device, passed_over: list[str]) -> None:
    message = f"packed layers on {device.type} run in backend {backend.name!r}"
    if passed_over:
        message += f", slower than others would be ({'; '.join(passed_over)})"
    if message not in _announced:
        _announced.add(message)
        _log.log(logging.WARNING if passed_over else logging.INFO, message)
