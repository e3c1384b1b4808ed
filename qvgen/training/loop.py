"""The training loop of quantization-aware training with a full-precision teacher.

Every random number of step s is drawn from a generator seeded by (seed, s), so that a run that stops and continues, in
another process or in another stage, takes exactly the steps of an uninterrupted one: the state is the tensors and s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from qvgen.data.latents import LatentDataset
from qvgen.models.family import Family
from qvgen.nn.swap import set_phi_
from qvgen.params import Params
from qvgen.phi.auxiliary import replace_parameters
from qvgen.quant.primitives import NUM_TRAIN_TIMESTEPS
from qvgen.sharded import is_sharded, own_rows, whole
from qvgen.training.batches import Batch, Batches
from qvgen.training.optim import build_optimizer, learning_rate_factor, set_learning_rate
from qvgen.training.ranks import Ranks


@dataclass(frozen=True)
class StepRecord:
    """One row of metrics/qat.csv. `gradient_norm` is the paper's own evidence for Φ (its figure 3), before clipping."""

    step: int
    loss: float
    gradient_norm: float
    rank: int
    u: float
    lr: float
    seconds: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


class Trainer:
    """Student, optimizer and step of one run; of `params` it reads seed, method, qat and decay. `student` must be as the
    method's `prepare_` leaves it, with Φ or adapters attached if it has them. `ranks`: processes that train along, each with
    a trainer like this one, and where the models are sharded with its part of them."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        family: Family,
        data: LatentDataset,
        params: Params,
        ranks: Ranks | None = None,
    ) -> None:
        self.student, self.teacher = student, teacher.eval().requires_grad_(False)
        self.device = next(student.parameters()).device
        self.ranks = ranks or Ranks(self.device)
        self.sharded = is_sharded(next(student.parameters()))
        self.family, self.data = family, data
        self.batches = Batches(data, family, params, self.ranks.rank, self.ranks.size)
        self.params, self.method, self.schedule = params, params.chosen, params.schedule
        self.step = 0
        self.optimizer = build_optimizer(student, params.qat)
        if params.compute.checkpointing:
            self._blocks().enable_gradient_checkpointing()
        self.average: dict[str, torch.Tensor] | None = None
        if params.qat.ema_decay is not None:
            self.average = {n: p.detach().clone() for n, p in self._averaged()}

    def run(self, until: int, on_step: Callable[[Trainer, StepRecord], None] | None = None) -> None:
        """Train from the current step up to, not including, step `until`. Raises FloatingPointError on a loss or
        gradients that are not finite, before they can reach the weights."""
        self.student.train()
        qat, ahead = self.params.qat, self.params.compute.workers
        batches = self.batches.between(self.step, until, ahead, pin_memory=self.device.type == "cuda")
        for step in range(self.step, until):
            started = time.perf_counter()
            phi = self.schedule.at(step)
            replaced = set_phi_(self.student, phi, self.params.decay.redecompose, self.ranks.copy_from_first_)
            replace_parameters(self.optimizer, replaced)
            factor = learning_rate_factor(step, self.schedule.total_steps, qat)
            set_learning_rate(self.optimizer, factor)

            loss = self._backward(next(batches))
            # Gradients of a sharded student are averaged as they are made.
            own = [] if self.sharded else [p.grad for p in self.student.parameters() if p.grad is not None]
            self.ranks.average_([loss, *own])
            norm = whole(nn.utils.clip_grad_norm_(self.student.parameters(), qat.max_grad_norm))
            reached, size = torch.stack([loss, norm]).tolist()  # the only wait for the device in a step
            if not (math.isfinite(reached) and math.isfinite(size)):
                self.optimizer.zero_grad(set_to_none=True)
                what = f"loss is {reached}, the norm of its gradient {size}"
                raise FloatingPointError(f"{what} at step {step}; lower qat.learning_rate or check the data")
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self._update_average()
            self.step = step + 1
            if on_step is not None:
                rate = qat.learning_rate * factor
                seconds = time.perf_counter() - started
                on_step(self, StepRecord(step, reached, size, phi.rank, phi.u, rate, seconds))

    def finish(self) -> nn.Module:
        """The trained student, without Φ, with averaged weights if there are any. Raises ValueError before the end."""
        if self.step < self.schedule.decay_end:
            raise ValueError(f"Φ decays until step {self.schedule.decay_end}, the run is at step {self.step}")
        set_phi_(self.student, self.schedule.at(self.step))
        if self.average is not None:
            with torch.no_grad():
                for name, parameter in self._averaged():
                    parameter.copy_(self.average[name])
        if self.params.compute.checkpointing:
            self._blocks().disable_gradient_checkpointing()
        return self.student.eval()

    def _blocks(self) -> Any:
        """The student as diffusers knows it, whose blocks it can run again in the backward pass instead of keeping what they
        compute."""
        return self.student

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Gradients of a step, added up over its micro-batches. Returns the loss, detached, on the device."""
        parts = [x.split(self.params.compute.micro_batch or len(x)) for x in batch]
        losses = []
        for part in zip(*parts, strict=True):
            loss = self._loss_on(*part)
            # The loss is a mean over samples, of which each part has the same number.
            (loss if len(parts[0]) == 1 else loss / len(parts[0])).backward()
            losses.append(loss.detach())
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def _loss(self, step: int) -> torch.Tensor:
        """The method's loss on the whole batch of a step."""
        return self._loss_on(*self.batches[step])

    def _loss_on(self, *batch: torch.Tensor) -> torch.Tensor:
        clean, text, timestep, noise, image = (x.to(self.device, non_blocking=True) for x in batch)
        noisy = self.family.add_noise(clean, noise, timestep)
        target = self.family.target(clean, noise, timestep)

        @torch.no_grad()
        def teacher() -> torch.Tensor:
            model: Any = self.teacher
            dtype = model.dtype  # diffusers keeps some parameters of a 16-bit model in float32; this leaves them out
            return self.family.predict(self.teacher, noisy.to(dtype), timestep, text.to(dtype), image.to(dtype)).float()

        mixed = self.params.qat.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16) if mixed else nullcontext():
            student = self.family.predict(self.student, noisy, timestep, text, image).float()
        return self.method.loss(student, teacher, target, 1 - timestep / NUM_TRAIN_TIMESTEPS)

    def _averaged(self) -> Iterator[tuple[str, nn.Parameter]]:
        # Φ changes shape and is not deployed: it has no average.
        return ((n, p) for n, p in self.student.named_parameters() if ".phi." not in n)

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is None:
            return
        decay = self.params.qat.ema_decay
        assert decay is not None
        for name, parameter in self._averaged():
            own_rows(self.average[name]).lerp_(own_rows(parameter), 1 - decay)
