"""Checkpoints of the public QVGen code, as a transformer with packed layers.

They hold float tensors that are fake-quantized again at every call. For a quantized layer NAME:

    NAME.w (N, K), NAME.b (N,)                         the weight before rounding, the bias
    NAME.wquantizer.scale, .zero_point (N, 1)          learned; codes are clamp(round(w / s + z), 0, P)
    NAME.aquantizer.lower, .upper (50,)                logits of the clips; a token's range is its own times 0.95 sigmoid
    NAME.loraA.weight (R, K), NAME.loraB.weight (N, R) in some files: w + loraB loraA is what is rounded

Other tensors keep their diffusers names. Rounding is ours (quant/primitives.py), so the packed model computes what the public
arithmetic does, with two exceptions. A token whose values all have one sign gets a range that includes 0 here; the public code
leaves 0 out. The public training takes a clip by the timestep of the first sample of a batch; here each sample has its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from qvgen.checkpoint.loadable import first_line
from qvgen.models.files import SourceError, check_safetensors
from qvgen.nn.packed_linear import PackedLinear
from qvgen.nn.targets import replace_module
from qvgen.nn.timestep import track_timestep
from qvgen.quant.primitives import NUM_TRAIN_TIMESTEPS, codes
from qvgen.quant.scheme import QuantArgs, QuantScheme

Clips = Literal["as-trained", "mean", "inference-script"]
SLOTS = 50  # pairs of clips that each layer has
_LARGEST_CLIP = 0.95  # the public code multiplies each sigmoid by it
_SCALE, _ZERO_POINT = "wquantizer.scale", "wquantizer.zero_point"
_WEIGHT, _BIAS, _LOWER, _UPPER = "w", "b", "aquantizer.lower", "aquantizer.upper"
_ADAPTER_DOWN, _ADAPTER_UP = "loraA.weight", "loraB.weight"
_SHOWN = 8  # names in a message


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file. Raises ValueError for another format, a damaged file and one without quantized layers."""
    from safetensors.torch import load_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: only safetensors files are read; others can run code of whoever wrote them")
    try:
        check_safetensors(path)
        tensors = load_file(path)
    except (SourceError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({first_line(error)})") from None
    if not any(name.endswith("." + _SCALE) for name in tensors):
        raise ValueError(f"{path} has no tensor ...{_SCALE}: it is not a checkpoint of the public QVGen code")
    return tensors


def pack_public_(
    transformer: nn.Module, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme, slots: list[int]
) -> list[str]:
    """Load a public checkpoint into a full-precision transformer, in place; return the names of the packed layers.

    `scheme` has as many timestep groups as `slots` has entries: the pair of clips of each group, or none for the mean of all
    (then there is one group). Raises ValueError that lists tensors which are missing, left over or of the wrong shape, before
    anything is changed.
    """
    names = [name.removesuffix("." + _SCALE) for name in tensors if name.endswith("." + _SCALE)]
    own = _check(transformer, tensors, names)
    for name in names:
        replace_module(transformer, name, _packed(name, tensors, scheme, slots))
    transformer.load_state_dict({name: tensors[name] for name in own}, strict=False)
    track_timestep(transformer, scheme.timestep_groups)
    return names


def public_scheme(names: list[str], weight_bits: int, activation_bits: int, groups: int) -> QuantScheme:
    """The scheme of the public code: weights per channel with a float zero point, dynamic activations per token."""
    return QuantScheme(
        weights=QuantArgs(num_bits=weight_bits, zero_point_domain="float"),
        input_activations=QuantArgs(num_bits=activation_bits, strategy="token"),
        timestep_groups=groups,
        targets=tuple(names),
    )


def slots_by_timestep(clips: Clips, scheduler: Any = None, steps: int = SLOTS) -> list[int]:
    """The pair of clips for each of 1,000 timestep groups; [] for the mean of all pairs.

    as-trained: slot t mod 50, so that a slot serves twenty noise levels, as in training. inference-script: the slot that the
    public script takes. It counts the transformer's calls down from 49 to 0, two a step with guidance, and stays at 0; the
    slot depends on the number of `steps` and on the `scheduler`'s timesteps, and both calls of a step get that of the first.
    Raises ValueError for another name.
    """
    if clips == "mean":
        return []
    if clips == "as-trained":
        return [timestep % SLOTS for timestep in range(NUM_TRAIN_TIMESTEPS)]
    if clips != "inference-script":
        raise ValueError(f"clips must be one of {', '.join(get_args(Clips))}, found {clips!r}")
    scheduler.set_timesteps(steps)
    sampled = scheduler.timesteps.float()
    nearest = (sampled[None] - (torch.arange(NUM_TRAIN_TIMESTEPS) + 0.5)[:, None]).abs().argmin(dim=1)
    return [max(0, SLOTS - 1 - 2 * int(step)) for step in nearest]


def _packed(name: str, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme, slots: list[int]) -> PackedLinear:
    weight, scale = tensors[f"{name}.{_WEIGHT}"].float(), tensors[f"{name}.{_SCALE}"].float()
    zero_point = tensors[f"{name}.{_ZERO_POINT}"].float()
    if (down := tensors.get(f"{name}.{_ADAPTER_DOWN}")) is not None:
        weight = weight + tensors[f"{name}.{_ADAPTER_UP}"].float() @ down.float()
    args = scheme.weights
    found = codes(weight, scale, zero_point, args)
    # A learned scale can have become negative. The same values on the grid mirrored: s (q - z) = -s ((P - q) - (P - z)).
    negative = scale < 0
    found = torch.where(negative, args.max_code - found, found)
    zero_point = torch.where(negative, args.max_code - zero_point, zero_point)
    lower, upper = (_clip(tensors[f"{name}.{logits}"], slots) for logits in (_LOWER, _UPPER))
    bias = tensors.get(f"{name}.{_BIAS}")
    return PackedLinear.from_codes(found.to(torch.uint8), scale.abs(), zero_point, lower, upper, bias, scheme)


def _clip(logits: torch.Tensor, slots: list[int]) -> torch.Tensor:
    clips = _LARGEST_CLIP * torch.sigmoid(logits.float())
    return clips[slots] if slots else clips.mean(dim=0, keepdim=True)


def _check(transformer: nn.Module, tensors: Mapping[str, torch.Tensor], names: list[str]) -> list[str]:
    """Names of the tensors that no quantized layer has. Raises ValueError if the checkpoint is not one of this model."""
    modules, state = dict(transformer.named_modules()), transformer.state_dict()
    expected: dict[str, tuple[int, ...]] = {}
    allowed: dict[str, tuple[int, ...]] = {}
    for name in names:
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"the checkpoint quantizes {name}, which is no linear layer of {type(transformer).__name__}")
        n, k = layer.weight.shape
        expected |= {f"{name}.{_WEIGHT}": (n, k), f"{name}.{_SCALE}": (n, 1), f"{name}.{_ZERO_POINT}": (n, 1)}
        expected |= {f"{name}.{_LOWER}": (SLOTS,), f"{name}.{_UPPER}": (SLOTS,)}
        if layer.bias is not None:
            expected[f"{name}.{_BIAS}"] = (n,)
        if (down := tensors.get(f"{name}.{_ADAPTER_DOWN}")) is not None:
            allowed |= {f"{name}.{_ADAPTER_DOWN}": (len(down), k), f"{name}.{_ADAPTER_UP}": (n, len(down))}
    quantized = {f"{name}.{tensor}" for name in names for tensor in ("weight", "bias")}
    own = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in quantized}
    expected |= own | allowed
    faults = []
    if missing := sorted(expected.keys() - tensors.keys()):
        faults.append(f"lacks {_some(missing)}")
    if unexpected := sorted(tensors.keys() - expected.keys()):
        faults.append(f"has {_some(unexpected)}, which this model has no place for")
    for name in sorted(expected.keys() & tensors.keys()):
        if tuple(tensors[name].shape) != expected[name]:
            faults.append(f"{name} is {list(tensors[name].shape)}, the model's {list(expected[name])}")
    if faults:
        raise ValueError(
            f"the checkpoint does not fit this {type(transformer).__name__}: it {'; '.join(faults[:_SHOWN])}. "
            "--base must be the full-precision model that it was trained from"
        )
    return list(own)


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:_SHOWN])}" + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
