"""Calibrated grids on disk: one safetensors file, tensors named `<layer>.<field of LayerGrid>`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qvgen.quant.calibrate import LayerGrid


def save_grids(path: str | Path, grids: Mapping[str, LayerGrid]) -> None:
    save_file({f"{name}.{k}": v for name, grid in grids.items() for k, v in grid.to_tensors().items()}, path)


def load_grids(path: str | Path) -> dict[str, LayerGrid]:
    """Grids by layer name. Raises ValueError for a damaged file."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); run the calibrate stage again") from None
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, _, leaf = key.rpartition(".")
        layers.setdefault(name, {})[leaf] = value
    return {name: LayerGrid.from_tensors(parts) for name, parts in layers.items()}
