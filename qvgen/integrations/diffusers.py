"""Packed checkpoints in diffusers: after `import qvgen.integrations.diffusers`, `from_pretrained` loads them like any other.

    import qvgen.integrations.diffusers
    pipeline = WanPipeline.from_pretrained(folder)                          # float32 around the packed layers
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.bfloat16)    # bfloat16 around them

Without `dtype` diffusers gives every tensor the dtype of a fresh model, float32, whatever dtype it is stored in. Packed
tensors are taken as they are stored either way. Loading is strict: it raises ValueError for tensors that are missing, left
over, or inconsistent, where diffusers would log a warning.

diffusers 0.42 has no function to register a quantizer: `register` writes into the two tables of `diffusers.quantizers.auto`.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from diffusers.utils import is_peft_available
from torch import nn

from qvgen.integrations.fused import fuse_
from qvgen.integrations.plain import cast_biases_, count_, keep_exact_in_float32, plain_
from qvgen.integrations.projections import join_without_copies_
from qvgen.nn.packed_linear import PackedLinear, packed_layers
from qvgen.nn.targets import match_linears, replace_module
from qvgen.nn.timestep import track_timestep
from qvgen.packing.config import METHOD, from_config, largest_timestep
from qvgen.packing.layout import EXACT_NAMES
from qvgen.packing.record import is_asked_for, record, verify
from qvgen.tensors import own_memory

if is_peft_available():  # diffusers has imported it then
    from qvgen.integrations import lora

_log = logging.getLogger(__name__)
_NOTED = "qvgen_config"  # in the metadata of a state dict
_told: list[str] = []  # that files record nothing is said once in a process


class QVGenMethod(str, Enum):  # noqa: UP042  diffusers formats the member: str and Enum, as its own
    """diffusers wants an Enum member as `quant_method`."""

    QVGEN = METHOD


@dataclass(init=False)  # for its __repr__: the mixin's own fails
class QVGenConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed model's config.json, as qvgen.packing.config writes it."""

    def __init__(self, **config: Any) -> None:
        self.quant_method = QVGenMethod.QVGEN  # type: ignore[assignment]
        self._config = copy.deepcopy(config) | {"quant_method": METHOD}
        self.scheme, self.num_targets = from_config(self._config)
        self.largest_timestep = largest_timestep(self._config)

    def to_dict(self) -> dict[str, Any]:
        """The dict it was made from, so that saving writes what was loaded."""
        return copy.deepcopy(self._config)


class QVGenQuantizer(DiffusersQuantizer):
    """Loads packed layers into a diffusers transformer and writes them back."""

    use_keep_in_fp32_modules = True  # otherwise ignored for quantized models, and Wan's time embedding becomes bfloat16
    requires_calibration = True  # diffusers then refuses to quantize a full-precision model while loading
    quantization_config: QVGenConfig

    def __init__(self, quantization_config: QVGenConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._loaded_keys: list[str] = []

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        # The first call that knows the files: nothing has been built from them yet.
        self._loaded_keys = loaded_keys
        files = [file for file in checkpoint_files if str(file).endswith(".safetensors")]
        if is_asked_for() and not verify(files) and not _told:
            _told.append(str(files))
            _log.warning(
                "the packed files %s record no hashes: an earlier version wrote them, and damage to scales, biases or "
                "config.json cannot be found; `dvc repro` or `qvgen import` writes them anew",
                ", ".join(map(str, files)),
            )
        return loaded_keys

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What save_pretrained writes: all hashes go into each shard. A layer that stands in two places is stored under both
        names."""
        config = getattr(state_dict, "_metadata", {}).get("", {}).get(_NOTED)
        state_dict = own_memory(state_dict)
        if not safe_serialization or config is None:
            return state_dict, {}
        return state_dict, record(state_dict, config)

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        scheme, expected = self.quantization_config.scheme, self.quantization_config.num_targets
        names = match_linears(model, scheme.targets, scheme.ignore)
        if len(names) != expected:
            raise ValueError(
                f"config.json says {expected} packed layers (num_targets), its targets select {len(names)} in "
                f"{type(model).__name__}; the config was edited or belongs to another model"
            )
        track_timestep(model, scheme.timestep_groups, self.quantization_config.largest_timestep)
        keep_exact_in_float32(type(model))
        for name in names:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            shape, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
            replace_module(model, name, PackedLinear(*shape, has_bias, scheme, dtype=linear.weight.dtype))
        return model

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        # Called once the packed layers stand: the place to compare what they need with what the files hold.
        if missing_keys:
            raise ValueError(
                f"packed checkpoint lacks {_some(missing_keys)} of {type(model).__name__}; it is incomplete, export it again"
            )
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
        unexpected = set(self._loaded_keys) - set(model.state_dict())
        unexpected = [key for key in unexpected if not any(re.search(pattern, key) for pattern in ignored)]
        if unexpected:
            raise ValueError(
                f"packed checkpoint holds {_some(unexpected)} that {type(model).__name__} with this quantization_config has "
                "no place for; the config was edited or belongs to another model"
            )
        return missing_keys

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Any, param_name: str, state_dict: dict[str, Any], **_: Any
    ) -> bool:
        owner, _dot, name = param_name.rpartition(".")
        return name in EXACT_NAMES and isinstance(model.get_submodule(owner), PackedLinear)

    def check_quantized_param_shape(self, param_name: str, current_param: torch.Tensor, new_param: torch.Tensor) -> bool:
        raise ValueError(
            f"{param_name}: expected shape {list(current_param.shape)}, found {list(new_param.shape)}; "
            "the checkpoint does not belong to this model or scheme"
        )

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **_: Any,
    ) -> None:
        # From the state dict, not `param_value`, which was already cast to the asked dtype.
        owner, _dot, name = param_name.rpartition(".")
        setattr(model.get_submodule(owner), name, state_dict[param_name].to(target_device or "cpu"))

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        if empty := [name for name, tensor in tensors if tensor.is_meta]:
            raise ValueError(f"loading left {_some(empty)} empty; the checkpoint is incomplete, export it again")
        for name, layer in packed_layers(model):
            layer.validate(name)
        fuse_(model)
        join_without_copies_(model)
        count_(model)
        cast_biases_(model)
        if is_peft_available():
            lora.refuse_merging_(model)
        model.register_state_dict_post_hook(_note_config)
        # diffusers refuses model.to(dtype) for quantized models; packed layers keep their grid by themselves.
        model.is_quantized = False  # type: ignore[assignment]
        return model

    def _dequantize(self, model: nn.Module) -> nn.Module:
        return plain_(model, _note_config)


def _note_config(model: Any, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    """Leave config.json as it is now with the state dict, all that the quantizer is given of a model that is saved."""
    local_metadata[_NOTED] = json.loads(model.to_json_string())


def register() -> None:
    """Make diffusers know "qvgen" checkpoints. Runs on import; again does nothing. Raises RuntimeError if another package
    already took the name."""
    tables = (auto.AUTO_QUANTIZER_MAPPING, QVGenQuantizer), (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, QVGenConfig)
    for table, ours in tables:
        found = table.get(METHOD, ours)
        if (found.__module__, found.__qualname__) != (ours.__module__, ours.__qualname__):
            raise RuntimeError(
                f"diffusers already has a quantizer {METHOD!r}, {found.__module__}.{found.__qualname__}: only one of the two "
                "packages can be imported in a process"
            )
    for table, ours in tables:
        table[METHOD] = ours
    if is_peft_available():
        lora.register()


def _some(names: list[str]) -> str:
    first = ", ".join(sorted(names)[:3])
    return f"{len(names)} tensors ({first}{', ...' if len(names) > 3 else ''})"


register()
