"""The order of training images as one endless stream that any process can compute, skip in and resume.

The stream is one seeded permutation of the dataset after the other. Optimizer step s takes the S = batch_size x
accumulation x processes images from position s * S on, whoever computes them: the same images make up step s for 8
images on one process, for 2 processes with 4, and for 4 accumulated batches of 2.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler


class StreamDataset(Dataset):
    """Items by stream position: epoch = position // length, then that epoch's permutation.

    Args:
        open_epoch: the dataset of one epoch, whose random augmentation differs from every other epoch's. Each reader
            process opens its own, so that one may be an epoch ahead of another.
        length: images of an epoch.
        seed: of the permutations.
    """

    def __init__(self, open_epoch: Callable[[int], Any], *, length: int, seed: int) -> None:
        self.open_epoch = open_epoch
        self.length = length
        self.seed = seed
        self.epoch = -1
        self.dataset: Any = None
        self.order = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> Any:
        epoch, offset = divmod(position, self.length)
        if epoch != self.epoch:
            self.epoch = epoch
            self.dataset = self.open_epoch(epoch)
            self.order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
        return self.dataset[int(self.order[offset])]


class MicroBatches(Sampler):
    """Endless lists of stream positions: this process's forward passes, step after step, starting at `first_step`."""

    def __init__(
        self, *, batch_size: int, accumulation: int, num_processes: int, process: int, first_step: int
    ) -> None:
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.first_batch = first_step * accumulation * num_processes + process

    def __iter__(self) -> Iterator[list[int]]:
        batch = self.first_batch
        while True:
            yield list(range(batch * self.batch_size, (batch + 1) * self.batch_size))
            batch += self.num_processes


def micro_batches(
    stream: StreamDataset, sampler: MicroBatches, collate: Callable[[list[Any]], Any], *, num_workers: int
) -> Iterator[Any]:
    """Collated batches in stream order, read ahead by `num_workers` processes."""
    return iter(DataLoader(stream, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers))
