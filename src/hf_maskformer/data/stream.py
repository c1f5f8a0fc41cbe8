"""Training samples of streamed data, shared out among processes and their reader processes."""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from hf_maskformer.data.copy_paste import paste_probability, sometimes_paste
from hf_maskformer.data.dataset_index import check_on_bad_sample
from hf_maskformer.data.sample import Sample
from hf_maskformer.data.segmentation_data import SegmentationData

logger = logging.getLogger(__name__)


class TrainingStream(IterableDataset[Sample]):
    """Augmented training samples of streamed data, for a `DataLoader` with any number of workers.

    An epoch gives each sample once, over all workers and processes. The random numbers of a sample depend on the
    seed, the epoch, the process, the worker and the sample's running number there.

    Args:
        data: streamed data.
        augmentation: (sample, rng) -> sample, or None for the sample as it is.
        seed: of the order and of the augmentation.
        on_bad_sample: "raise" the ValueError of a sample that cannot be read, or "skip" it with a warning.
        rank: number of this process.
        world_size: number of processes.
        copy_paste_probability: how often objects of the sample before, augmented anew, are pasted on a sample; None =
            as often as the augmentation says.

    Raises:
        ValueError: `data` is not streamed, or objects are to be pasted for the semantic task.
    """

    def __init__(
        self,
        data: SegmentationData,
        augmentation: Callable[[Sample, np.random.Generator], Sample] | None = None,
        seed: int = 0,
        on_bad_sample: str = "raise",
        rank: int = 0,
        world_size: int = 1,
        copy_paste_probability: float | None = None,
    ) -> None:
        check_on_bad_sample(on_bad_sample)
        if not data.streaming:
            raise ValueError("data is not streamed: load it with streaming=True, or use TrainingDataset")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be in 0..world_size - 1 = {world_size - 1}")
        self.data = data
        self.augmentation = augmentation
        self.seed = seed
        self.on_bad_sample = on_bad_sample
        self.rank = rank
        self.world_size = world_size
        self.copy_paste_probability = paste_probability(copy_paste_probability, augmentation, data.task)
        # In shared memory, so that workers which live through several epochs see the change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def num_shards(self) -> int:
        """The most DataLoader workers of this process that get rows."""
        return int(self.data.dataset.shuffled(self.seed, 0, self.rank, self.world_size).num_shards)

    def set_epoch(self, epoch: int) -> None:
        """Changes the order and all random numbers; call it before each pass."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Sample]:
        for _, sample in self.numbered_samples(int(self._epoch)):
            if sample is not None:
                yield sample

    def numbered_samples(self, epoch: int, first: int = 0) -> Iterator[tuple[int, Sample | None]]:
        """(running number, sample) of this reader's part of an epoch; None for those before the number `first`.

        Those are not augmented. Their images are only decoded where "skip" has to know whether they can be read:
        samples that cannot have no number.
        """
        info = get_worker_info()
        reader = [self.rank, 0 if info is None else info.id]
        before: Sample | None = None
        number = 0
        for row in self.data.dataset.shuffled(self.seed, epoch, self.rank, self.world_size):
            decoded = None
            if number >= first - 1 or self.on_bad_sample == "skip":
                decoded = self._readable(row)
                if decoded is None:
                    continue
            if decoded is None or number < first:
                yield number, None
            else:
                yield number, self._augmented(decoded, before, [self.seed, epoch, *reader, number])
            before = decoded
            number += 1

    def _augmented(self, sample: Sample, before: Sample | None, state: list[int]) -> Sample:
        result = self._augment(sample, np.random.default_rng(state))
        if before is None:
            return result
        things = self.data.label_spec.thing_label_ids
        draw = partial(self._augment, before)
        return sometimes_paste(result, draw, things, self.copy_paste_probability, state)

    def _augment(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return sample if self.augmentation is None else self.augmentation(sample, rng)

    def _readable(self, row: Mapping[str, Any]) -> Sample | None:
        try:
            return self.data.row_sample(row)
        except ValueError as error:
            if self.on_bad_sample == "raise":
                raise
            logger.warning("a sample is skipped: %s", error)
            return None
