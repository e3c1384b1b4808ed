"""Inputs of layers, kept while the full-precision model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn


class InputRecorder:
    """Keeps up to `rows` input rows per layer and timestep group, chosen at random with a fixed seed."""

    def __init__(self, groups: int, rows: int, seed: int = 0) -> None:
        self.groups, self.rows = groups, rows
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: dict[tuple[str, int], list[torch.Tensor]] = {}
        self.group: torch.Tensor | None = None  # timestep group of each sample of the current call

    @contextmanager
    def attached(self, layers: dict[str, nn.Module]) -> Iterator[InputRecorder]:
        handles = [layer.register_forward_pre_hook(partial(self._record, name)) for name, layer in layers.items()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def inputs(self, layer: str, group: int) -> torch.Tensor:
        """Recorded rows (m, K) float32, m <= rows. Raises ValueError if the layer saw no sample of this group."""
        kept = self._kept.get((layer, group))
        if not kept:
            raise ValueError(
                f"layer {layer} saw no calibration input of timestep group {group}; use at least "
                f"{self.groups} calibration clips (one per timestep group)"
            )
        return torch.cat(kept)

    def _record(self, layer: str, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x, groups = args[0], self.group
        assert groups is not None
        if not torch.isfinite(x).all():
            raise ValueError(f"calibration data gives NaN or Inf at the input of layer {layer}; check the clips and the model")
        members = groups.tolist()
        for group in sorted(set(members)):
            kept = self._kept.setdefault((layer, group), [])
            missing = self.rows - sum(map(len, kept))
            if missing <= 0:
                continue
            of_group = [sample for sample, its_group in enumerate(members) if its_group == group]
            x_MK = x[torch.tensor(of_group, device=x.device)].reshape(-1, x.shape[-1])
            # At most half of what is missing from one call, so that several clips are represented.
            take = min(len(x_MK), max(missing // 2, 16), missing)
            index = torch.randperm(len(x_MK), generator=self._generator)[:take]
            kept.append(x_MK[index.to(x.device)].float().cpu())
