"""Where in the transformer a student departs from its teacher: errors of what each attention and feed-forward adds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from qvgen.models.family import Family


@torch.no_grad()
def module_errors(
    teacher: nn.Module,
    student: nn.Module,
    family: Family,
    latents: torch.Tensor,
    text: torch.Tensor,
    timesteps: torch.Tensor,
    layers: Sequence[str],
    seed: int,
    image: torch.Tensor | None = None,
) -> dict[str, float]:
    """|student - teacher|^2 / |teacher|^2 of the output of every module that holds some of the linear `layers` (their
    attention or feed-forward), on clean latents (n, ...) made noisy at `timesteps` (n,), text (n, l, d), image
    (n, m, e).

    Errors inherited from the modules before are included, as they are in the deployed model.
    """
    names = list(dict.fromkeys(".".join(layer.split(".")[:3]) for layer in layers))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    device = next(teacher.parameters()).device
    latents, noise, timesteps, text = (x.to(device) for x in (latents.float(), noise, timesteps, text))
    noisy = family.add_noise(latents, noise, timesteps)
    outputs: list[dict[str, torch.Tensor]] = []
    for model in (teacher, student):
        with _recorded(model, names) as found:
            family.predict(model, noisy, timesteps, text, None if image is None else image.to(device))
        outputs.append(found)
    wanted, got = outputs
    return {n: float((got[n] - wanted[n]).square().sum() / wanted[n].square().sum()) for n in names if n in wanted}


@contextmanager
def _recorded(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    found: dict[str, torch.Tensor] = {}
    handles = [model.get_submodule(name).register_forward_hook(partial(_keep, found, name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keep(found: dict[str, torch.Tensor], name: str, _module: nn.Module, _args: Any, output: Any) -> None:
    parts = output if isinstance(output, tuple) else (output,)  # CogVideoX's attention returns video and text
    found[name] = torch.cat([part.float().flatten() for part in parts])
