"""Calibration on disk: safetensors files, tensors named `<layer>.<field of LayerGrid or ChannelGrid>`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from qvgen.models.folding import ChannelGrid
from qvgen.quant.grid import LayerGrid
from qvgen.tensors import save_tensors


def save_grids(path: str | Path, grids: Mapping[str, LayerGrid]) -> None:
    """Grids by layer name, as `load_grids` reads them."""
    save_tensors(path, {f"{name}.{k}": v for name, grid in grids.items() for k, v in grid.to_tensors().items()})


def load_grids(path: str | Path) -> dict[str, LayerGrid]:
    """Grids by layer name. Raises ValueError for a damaged file."""
    return {name: LayerGrid.from_tensors(parts) for name, parts in _by_layer(path).items()}


def save_folds(path: str | Path, folds: Mapping[str, ChannelGrid]) -> None:
    """Folded inputs, tensors named `<input>.<shift or scale>`; an empty file where nothing is folded."""
    save_tensors(path, {f"{name}.{k}": v for name, fold in folds.items() for k, v in fold._asdict().items()})


def load_folds(path: str | Path) -> dict[str, ChannelGrid]:
    """Folds by the input's name (FoldableInput.name). Raises ValueError for a damaged file."""
    return {name: ChannelGrid(**parts) for name, parts in _by_layer(path).items()}


def _by_layer(path: str | Path) -> dict[str, dict[str, torch.Tensor]]:
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); run the calibrate stage again") from None
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, _, leaf = key.rpartition(".")
        layers.setdefault(name, {})[leaf] = value
    return layers
