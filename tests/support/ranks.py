"""What processes of tests/integration/test_ranks.py do; by itself, a run that goes on until it is killed."""

import time

import torch

from qvgen.training.ranks import Ranks, ranks


def fail_on_rank_1(group: Ranks) -> None:
    if group.rank == 1:
        raise ValueError("no clips on rank 1")
    group.average_([torch.ones(3)])


def average_without_end(group: Ranks) -> None:
    group.average_([torch.ones(3)])
    if group.rank == 0:
        print("together", flush=True)
        time.sleep(600)
    group.average_([torch.ones(3)])


if __name__ == "__main__":
    with ranks(2, torch.device("cpu"), average_without_end) as group:
        average_without_end(group)
