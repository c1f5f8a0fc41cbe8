"""Pasted objects cover what is under them, pixel for pixel."""

import numpy as np
import pytest

from hf_maskformer.data.augment_presets import augmentation_preset
from hf_maskformer.data.collate import TrainingDataset
from hf_maskformer.data.copy_paste import choose_objects, paste_objects
from hf_maskformer.data.load import load
from hf_maskformer.data.sample import Sample

THING, STUFF = 1, 0


def sample_of(rows: list[str], labels: list[int], colour: int, crowd: list[bool] | None = None) -> Sample:
    """Segment k stands where the picture holds the letter a + k; the image holds one colour."""
    letters = np.array([list(row) for row in rows])
    masks = np.stack([letters == chr(ord("a") + index) for index in range(len(labels))])
    image = np.full((*letters.shape, 3), colour, dtype=np.uint8)
    return Sample(image, masks, np.array(labels), None if crowd is None else np.array(crowd), file_name="x.png")


BASE = ["aabb", "aabb", "aacc"]


def test_covered_pixels_leave_their_segments_and_vanished_segments_go() -> None:
    base = sample_of(BASE, [STUFF, THING, THING], colour=10)
    source = sample_of(["....", ".aab", "..ab"], [THING, THING], colour=200)
    result = paste_objects(base, source, np.array([True, True]))
    assert result.class_labels.tolist() == [STUFF, THING, THING, THING]  # c is covered whole
    assert result.masks.astype(int).tolist() == [
        [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]],
        [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]],
    ]
    assert result.image[..., 0].tolist() == [[10] * 4, [10, 200, 200, 200], [10, 10, 200, 200]]
    assert base.image.max() == 10, "the first image is not written to"


def test_only_the_chosen_ones_and_objects_that_overlap() -> None:
    base = sample_of(BASE, [STUFF, THING, THING], colour=10)
    masks = np.zeros((3, 3, 4), dtype=bool)
    masks[0, 0, :3] = masks[1, :, 1] = masks[2, :, 3] = True
    source = Sample(np.full((3, 4, 3), 50, np.uint8), masks, np.array([THING, THING, THING]))
    result = paste_objects(base, source, np.array([True, True, False]))
    np.testing.assert_array_equal(result.masks[-2:], masks[:2])
    np.testing.assert_array_equal(result.image[..., 0] == 50, masks[0] | masks[1])
    assert not (result.masks[:-2].any(axis=0) & (masks[0] | masks[1])).any()


@pytest.mark.parametrize("shape", [(2, 6), (5, 2), (1, 1), (9, 9)])
def test_another_size_is_pasted_from_the_top_left_corner(shape: tuple[int, int]) -> None:
    base = sample_of(BASE, [STUFF, THING, THING], colour=10)
    source = Sample(np.full((*shape, 3), 99, np.uint8), np.ones((1, *shape), bool), np.array([THING]))
    result = paste_objects(base, source, np.array([True]))
    expected = np.zeros((3, 4), dtype=bool)
    expected[: shape[0], : shape[1]] = True
    np.testing.assert_array_equal(result.masks[-1], expected)
    np.testing.assert_array_equal(result.image[..., 0] == 99, expected)


def test_nothing_chosen_changes_nothing() -> None:
    base = sample_of(BASE, [STUFF, THING, THING], colour=10)
    assert paste_objects(base, base, np.zeros(3, bool)) is base


def test_crowds_and_stuff_are_never_chosen() -> None:
    source = sample_of(["abcd"], [STUFF, THING, THING, THING], colour=1, crowd=[False, True, False, False])
    chosen = np.array([choose_objects(source, [THING], np.random.default_rng(seed)) for seed in range(60)])
    assert not chosen[:, :2].any()
    assert 15 < chosen[:, 2].sum() < 45
    assert (chosen[:, 2] != chosen[:, 3]).any()


def test_the_dataset_pastes_by_seed_epoch_and_index_only() -> None:
    data = load("scenes", task="panoptic", length=6, image_size=64)
    plain, one, two = (TrainingDataset(data, copy_paste_probability=value) for value in (0.0, 0.7, 0.7))
    backwards = [two[index] for index in range(5, -1, -1)][::-1]
    changed = 0
    for index in range(6):
        np.testing.assert_array_equal(one[index].image, backwards[index].image)
        np.testing.assert_array_equal(one[index].masks, backwards[index].masks)
        changed += bool((one[index].image != plain[index].image).any())
        assert one[index].masks.sum(axis=0).max() == 1, "panoptic masks stay apart"
    assert 0 < changed < 6
    two.set_epoch(1)
    assert any((one[index].image != two[index].image).any() for index in range(6))


def test_masks_of_classes_cannot_be_pasted() -> None:
    data = load("scenes", task="semantic", length=1, image_size=64)
    with pytest.raises(ValueError, match=r"copy_paste_probability is 0\.5, but the task is semantic"):
        TrainingDataset(data, copy_paste_probability=0.5)


def test_without_a_number_the_augmentations_own_counts() -> None:
    data = load("scenes", task="instance", length=2, image_size=64)
    preset = augmentation_preset("copy-paste-coco-instance", (64, 64))
    assert TrainingDataset(data, preset).copy_paste_probability == 1.0
    assert TrainingDataset(data, preset, copy_paste_probability=0.0).copy_paste_probability == 0.0
    assert TrainingDataset(data).copy_paste_probability == 0.0
    semantic = load("scenes", task="semantic", length=2, image_size=64)
    with pytest.raises(ValueError, match=r"copy_paste_probability is 1\.0, but the task is semantic"):
        TrainingDataset(semantic, preset)
