"""The order of training images as one endless stream that any process can compute, skip in and resume.

The stream is one seeded permutation of the dataset after the other. Optimizer step s takes the S = batch_size x
accumulation x processes images from position s * S on, whoever computes them: the same images make up step s for 8
images on one process, for 2 processes with 4, and for 4 accumulated batches of 2.

Streamed data has no positions: there each reader process goes through its own part of the files, epoch after epoch.
The same run with the same numbers of processes and readers sees the same images, but other numbers divide them anew.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from hf_maskformer.data.sample import Sample
from hf_maskformer.data.stream import TrainingStream

MAX_EMPTY_EPOCHS = 100  # a reader may get nothing in one epoch, but other files in the next

logger = logging.getLogger(__name__)


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


class EndlessSamples(IterableDataset[Sample]):
    """The samples of a `TrainingStream`, epoch after epoch, without those that were used before a run was resumed.

    Args:
        stream: its epochs are opened one after the other.
        batch_size: samples per batch.
        first_batch: batches of this process that were used before, as many from each reader.
    """

    def __init__(self, stream: TrainingStream, *, batch_size: int, first_batch: int) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.first_batch = first_batch

    def __iter__(self) -> Iterator[Sample]:
        """ValueError if there are no samples at all."""
        reader = get_worker_info()
        used = self.first_batch // (1 if reader is None else reader.num_workers) * self.batch_size
        epoch = empty = 0
        while empty < MAX_EMPTY_EPOCHS:
            length = 0
            for place, sample in self.stream.numbered_samples(epoch, first=used):
                length = place + 1
                if sample is not None:
                    yield sample
            used = max(0, used - length)
            empty = 0 if length else empty + 1
            epoch += 1
        raise ValueError(f"{self.stream.data!r}: no sample was found in {MAX_EMPTY_EPOCHS} passes")


def streamed_batches(
    stream: TrainingStream,
    collate: Callable[[list[Any]], Any],
    *,
    batch_size: int,
    first_batch: int,
    num_workers: int,
) -> Iterator[Any]:
    """Endless collated batches of streamed data; no more reader processes than there are files."""
    readers = min(num_workers, stream.num_shards)
    if readers < num_workers:
        logger.warning("%d reader processes instead of %d: the data has no more files", readers, num_workers)
    # A loader begins with its first reader, so the batches of an unfinished round are read again and passed over.
    unfinished = first_batch % max(1, readers)
    samples = EndlessSamples(stream, batch_size=batch_size, first_batch=first_batch - unfinished)
    batches = iter(DataLoader(samples, batch_size=batch_size, collate_fn=collate, num_workers=readers))
    for _ in range(unfinished):
        next(batches)
    return batches
