"""From a loaded dataset to batches: reproducible training samples and the call of the image processor."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_maskformer.data.copy_paste import paste_probability, sometimes_paste
from hf_maskformer.data.dataset_index import check_on_bad_sample
from hf_maskformer.data.sample import Sample
from hf_maskformer.data.segmentation_data import SegmentationData

logger = logging.getLogger(__name__)


class TrainingDataset(Dataset[Sample]):
    """Decodes and augments on access; item i of epoch e depends on (seed, e, i) only, whatever the workers do.

    Args:
        data: what to read.
        augmentation: (sample, rng) -> sample, or None for the sample as it is.
        seed: first part of each item's random state.
        on_bad_sample: what to do when a sample cannot be read: "raise" its ValueError, or "skip": log it and take the
            next index that can be read.
        copy_paste_probability: how often objects of another image, augmented like this one, are pasted on it
            (`data/copy_paste.py`); None = as often as the augmentation says. It has random numbers of its own:
            without it items stay what they are.

    Raises:
        ValueError: objects are to be pasted for the semantic task, whose masks are classes.
    """

    def __init__(
        self,
        data: SegmentationData,
        augmentation: Callable[[Sample, np.random.Generator], Sample] | None = None,
        seed: int = 0,
        on_bad_sample: str = "raise",
        copy_paste_probability: float | None = None,
    ) -> None:
        check_on_bad_sample(on_bad_sample)
        self.data = data
        self.augmentation = augmentation
        self.seed = seed
        self.on_bad_sample = on_bad_sample
        self.copy_paste_probability = paste_probability(copy_paste_probability, augmentation, data.task)
        # In shared memory, so that workers which live through several epochs see the change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.data)

    def set_epoch(self, epoch: int) -> None:
        """Changes the random numbers of all items; call it before each pass."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> Sample:
        state = [self.seed, int(self._epoch), index]
        sample = self._augmented(index, np.random.default_rng(state))
        return sometimes_paste(
            sample,
            lambda rng: self._augmented(int(rng.integers(len(self))), rng),
            self.data.label_spec.thing_label_ids,
            self.copy_paste_probability,
            state,
        )

    def _augmented(self, index: int, rng: np.random.Generator) -> Sample:
        sample = self._readable(index)
        return sample if self.augmentation is None else self.augmentation(sample, rng)

    def _readable(self, index: int) -> Sample:
        """The sample at `index`, or with "skip" the first readable one after it."""
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            try:
                return self.data.sample(candidate)
            except ValueError as error:
                if self.on_bad_sample == "raise":
                    raise
                logger.warning("sample %d is skipped: %s", candidate, error)
        raise ValueError(f"none of the {len(self)} samples can be read")


class Collator:
    """Turns a list of samples into the processor's batch, with the images' names under `image_ids`.

    Augmentation has already made the size, so the processor rescales, normalises and pads, but does not resize. It is
    handed the id maps, and writes each mask once, where it stays.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, samples: Sequence[Sample]) -> Any:
        if not samples:
            raise ValueError("samples is empty: a batch needs at least one image")
        batch = self.processor(
            images=[sample.image for sample in samples],
            masks=[sample.segments for sample in samples],
            class_labels=[sample.class_labels for sample in samples],
            do_resize=False,
            return_tensors="pt",
        )
        batch["image_ids"] = [sample.image_id for sample in samples]
        return batch
