"""Training items depend on (seed, epoch, index) only; bad images are named or skipped; batches fit the processor."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_maskformer.data.augment import TrainAugmentation
from hf_maskformer.data.collate import Collator, TrainingDataset
from hf_maskformer.data.load import load
from hf_maskformer.data.sample import Sample
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor


def first(samples: list[Sample]) -> Sample:
    return samples[0]


def scenes(seed: int = 0, length: int = 4) -> TrainingDataset:
    return TrainingDataset(load("scenes", length=length, image_size=64), TrainAugmentation((48, 48)), seed=seed)


def test_items_depend_on_seed_epoch_and_index_only() -> None:
    one, two = scenes(), scenes()
    for dataset in (one, two):
        dataset.set_epoch(3)
    backwards = [two[index] for index in (3, 2, 1, 0)][::-1]
    for index in range(4):
        np.testing.assert_array_equal(one[index].image, backwards[index].image)
        np.testing.assert_array_equal(one[index].masks, backwards[index].masks)


def test_seed_and_epoch_change_the_items() -> None:
    dataset = scenes()
    before = dataset[0].image.tobytes()
    assert scenes(seed=1)[0].image.tobytes() != before
    dataset.set_epoch(1)
    assert dataset[0].image.tobytes() != before
    dataset.set_epoch(0)
    assert dataset[0].image.tobytes() == before


def test_workers_that_live_on_see_the_epoch() -> None:
    dataset = scenes(length=2)
    loader = DataLoader(dataset, batch_size=1, num_workers=1, persistent_workers=True, collate_fn=first)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        expected = [dataset[index].image for index in range(2)]
        for sample, image in zip(loader, expected, strict=True):
            np.testing.assert_array_equal(sample.image, image)


def break_image(root: Path, number: int) -> None:
    """Same size, so that only decoding fails."""
    path = root / "train" / "images" / f"{number}.png"
    content = path.read_bytes()
    path.write_bytes(content[:45] + bytes(len(content) - 45))


def test_bad_sample_raises_with_its_name(semantic_folder: Path, cache_dir: str) -> None:
    data = load(semantic_folder, cache_dir=cache_dir)
    break_image(semantic_folder, 0)
    with pytest.raises(ValueError, match=r"images/0\.png: cannot be read as an image"):
        TrainingDataset(data)[0]


def test_bad_sample_is_skipped_and_named(
    semantic_folder: Path, cache_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = load(semantic_folder, cache_dir=cache_dir)
    dataset = TrainingDataset(data, on_bad_sample="skip")
    break_image(semantic_folder, 1)
    with caplog.at_level(logging.WARNING):
        assert dataset[1].image_id == "0"
    assert "images/1.png: cannot be read" in caplog.text
    break_image(semantic_folder, 0)
    with pytest.raises(ValueError, match="none of the 2 samples can be read"):
        dataset[0]


def test_unknown_policy_is_refused(semantic_folder: Path) -> None:
    with pytest.raises(ValueError, match="on_bad_sample 'ignore' is not allowed: raise, skip"):
        TrainingDataset(load("scenes", length=1), on_bad_sample="ignore")


def test_collator_pads_to_the_canvas_and_keeps_the_targets() -> None:
    processor = HfMaskFormerImageProcessor(size={"max_height": 64, "max_width": 96})
    rng = np.random.default_rng(0)
    masks = rng.random((2, 40, 50)) < 0.3
    samples = [
        Sample(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8), masks, np.array([4, 1]), image_id="a"),
        Sample(np.zeros((64, 96, 3), np.uint8), np.zeros((0, 64, 96)), np.zeros(0), image_id="b"),
    ]
    batch = Collator(processor)(samples)
    assert batch["image_ids"] == ["a", "b"]
    assert batch["pixel_values"].shape == (2, 3, 64, 96)
    assert batch["pixel_mask"].sum(dim=(1, 2)).tolist() == [40 * 50, 64 * 96]
    expected = torch.zeros(2, 64, 96, dtype=torch.bool)
    expected[:, :40, :50] = torch.from_numpy(masks)
    assert torch.equal(batch["mask_labels"][0].bool(), expected)
    assert batch["class_labels"][0].tolist() == [4, 1]
    assert batch["mask_labels"][1].shape == (0, 64, 96)
    assert batch["class_labels"][1].shape == (0,)


def test_collator_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="samples is empty"):
        Collator(HfMaskFormerImageProcessor())([])
