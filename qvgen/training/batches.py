"""The batches of training: which clips, timesteps and noise a step has, in this process or read ahead by others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from qvgen.data.latents import LatentDataset
from qvgen.models.family import Family
from qvgen.params import Params

Batch = tuple[torch.Tensor, ...]  # latents, text, timesteps, noise, embeddings of first frames (n, m, e)


class Batches(Dataset[Batch]):
    """Item `step` is the batch of that step, on the CPU. It depends on the seed, the step and the rank alone: all ranks draw
    the batch of all of them, and each takes its share, so that the number of processes changes nothing.

    Raises ValueError for a batch that the processes do not divide.
    """

    def __init__(self, data: LatentDataset, family: Family, params: Params, rank: int = 0, world_size: int = 1) -> None:
        if params.qat.batch_size % world_size:
            raise ValueError(
                f"qat.batch_size = {params.qat.batch_size} clips cannot be shared equally by {world_size} processes: choose a "
                f"multiple of {world_size}"
            )
        self.data, self.family, self.params = data, family, params
        share = params.qat.batch_size // world_size
        if share % (params.compute.micro_batch or share):  # checked for compute.processes, and torchrun may have started more
            raise ValueError(f"compute.micro_batch = {params.compute.micro_batch} does not divide a process's {share} clips")
        self.share = slice(rank * share, (rank + 1) * share)
        self._size = data.size_index
        numbers = range(int(self._size.max()) + 1) if data.has_several_sizes else ()
        self._of_size = [(self._size == number).nonzero()[:, 0] for number in numbers]  # empty: all have one

    def __getitem__(self, step: int) -> Batch:
        qat, method = self.params.qat, self.params.chosen
        generator = torch.Generator().manual_seed(step_seed(self.params.seed, step))
        index = self._draw(qat.batch_size, generator)
        # Which captions are dropped is drawn for all, and only the share is read.
        dropped = torch.rand(len(index), generator=generator) < method.caption_dropout(qat.caption_dropout)
        clean, text = self.data.read(index[self.share], dropped[self.share])
        timestep = method.timesteps(self.family, len(index), generator)
        noise = torch.randn((len(index), *clean.shape[1:]), generator=generator)
        return clean, text, timestep[self.share], noise[self.share], self.data.image[index[self.share]]

    def _draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Clips of one size, which is drawn as often as it has clips, so that all clips are drawn equally often."""
        if not self._of_size:
            return torch.randint(len(self.data), (count,), generator=generator)
        members = self._of_size[int(self._size[torch.randint(len(self.data), (), generator=generator)])]
        return members[torch.randint(len(members), (count,), generator=generator)]

    def between(self, first: int, until: int, workers: int = 0, pin_memory: bool = False) -> Iterator[Batch]:
        """The batches of steps `first` to `until`, in order, read ahead by `workers` processes if there are any."""
        if not workers:
            return (self[step] for step in range(first, until))
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(first, until),
            num_workers=workers,
            pin_memory=pin_memory,
            multiprocessing_context="spawn",  # a stage has threads, and may have a GPU, which a fork would break
            generator=torch.Generator(),  # it draws seeds for the workers, which use none
        )
        return iter(loader)


def step_seed(seed: int, step: int) -> int:
    """Distinct 63-bit seeds for every (seed, step); neighbouring seeds must not share steps."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 1) % (2**63 - 1)
