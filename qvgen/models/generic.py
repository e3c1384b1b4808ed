"""A transformer that nobody described: which of its layers are packed when they are rounded without training.

What a family adds (family.py) is needed by training and by the stages. Rounding needs a model of linear layers in blocks, and
no timestep, because there is one group of them. So image models, image-to-video models and pairs of experts go through here.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from qvgen.models.files import DENOISERS, SourceError, read_json


def block_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers inside the repeated blocks of `model`, which are nn.ModuleList members of it.

    Embedders and the last projection stay outside, as the families' own targets leave them. Raises ValueError for a model
    without such layers.
    """
    lists = [name for name, child in model.named_children() if isinstance(child, nn.ModuleList)]
    prefixes = tuple(f"{name}." for name in lists)
    found = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name.startswith(prefixes)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layers in blocks (nn.ModuleList): name them as targets")
    return found


def denoisers(folder: Path) -> list[str]:
    """Components of a pipeline folder that denoise. Raises SourceError if it has none, or code that came with the model."""
    index = read_json(folder / "model_index.json", "so this is not a diffusers pipeline folder")
    found = [name for name in DENOISERS if isinstance(index.get(name), list) and index[name][1] is not None]
    if not found:
        raise SourceError(f"{folder} has no component {' or '.join(DENOISERS)}: only transformers are packed")
    for name in found:
        if index[name][0] != "diffusers":
            raise SourceError(
                f"{folder / 'model_index.json'}: component {name} is code of {index[name][0]!r:.100}; only diffusers' own "
                "classes are loaded"
            )
    return found
