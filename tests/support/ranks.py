"""What processes of tests/integration/test_ranks.py do; by itself, a run that goes on until it is killed."""

import time

import torch

from qvgen.training.ranks import Ranks, ranks


def fail_on_rank_1(group: Ranks) -> None:
    if group.rank == 1:
        raise ValueError("no clips on rank 1")
    group.average_([torch.ones(3)])


def average_of_all_kinds(group: Ranks) -> list[torch.Tensor]:
    """What becomes of rank, rank + 1, ...: several dtypes, a view, one number, and more than is sent at a time."""
    values = [
        torch.full((3, 2), float(group.rank)).T,
        torch.tensor(group.rank + 1.0),
        torch.full((2,), group.rank + 2.0).double(),
    ]
    values += [torch.full((1 << 21,), group.rank + 3.0) for _ in range(3)] + [torch.full((1 << 22,), group.rank + 4.0)]
    group.average_(values)
    return values


def average_without_end(group: Ranks) -> None:
    group.average_([torch.ones(3)])
    if group.rank == 0:
        print("together", flush=True)
        time.sleep(600)
    group.average_([torch.ones(3)])


if __name__ == "__main__":
    with ranks(2, torch.device("cpu"), average_without_end) as group:
        average_without_end(group)
