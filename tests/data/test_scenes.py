"""The built-in scenes: reproducible, exact, with the same interface as files."""

import numpy as np
import pytest

from hf_maskformer.data.load import load
from hf_maskformer.data.sample import FEATURES, targets_for_task
from hf_maskformer.data.scene_drawing import MIN_VISIBLE_FRACTION, STUFF_NAMES, draw_scene
from hf_maskformer.data.segmentation_data import SegmentationData
from hf_maskformer.model.masks import decode_rle


def test_the_same_seed_gives_the_same_scene() -> None:
    first, second = (load("scenes", length=3, seed=5, image_size=64) for _ in range(2))
    for index in (2, 0, 1):  # in any order
        np.testing.assert_array_equal(first.sample(index).image, second.sample(index).image)
    np.testing.assert_array_equal(first.sample(0).masks, second.sample(0).masks)


def test_seeds_splits_and_indices_give_other_scenes() -> None:
    images = [
        load("scenes", split=split, length=2, seed=seed, image_size=64).image(index)
        for split in ("train", "val")
        for seed in (0, 1)
        for index in (0, 1)
    ]
    assert len({image.tobytes() for image in images}) == len(images)


def test_the_length_does_not_change_the_scenes() -> None:
    np.testing.assert_array_equal(load("scenes", length=2).image(1), load("scenes", length=9).image(1))


@pytest.mark.parametrize("index", range(12))
def test_every_pixel_belongs_to_one_segment(index: int) -> None:
    scene = draw_scene(np.random.default_rng([1, index]), 96, 120)
    count = len(scene.label_ids)
    assert scene.image.shape == (96, 120, 3)
    assert np.unique(scene.segment_map).tolist() == list(range(1, count + 1))
    things = scene.label_ids >= len(STUFF_NAMES)
    assert 1 <= things.sum() <= 7
    assert not things[: (~things).sum()].any(), "stuff comes first"
    for number in np.flatnonzero(things):
        visible, whole = scene.segment_map == number + 1, scene.amodal_masks[number]
        assert not (visible & ~whole).any()
        assert visible.sum() >= MIN_VISIBLE_FRACTION * whole.sum()
    assert scene.image.std() > 15, "not a flat picture"


def test_things_cover_each_other() -> None:
    scenes = [draw_scene(np.random.default_rng([2, index]), 96, 96) for index in range(20)]
    hidden = [
        (scene.amodal_masks.sum(axis=(1, 2)) > np.bincount(scene.segment_map.reshape(-1))[1:]).any()
        for scene in scenes
    ]
    assert sum(hidden) > 10


def test_no_class_is_told_by_its_mean_colour_alone() -> None:
    """The mean colour of each class, averaged over scenes, lies within the spread of every other thing class."""
    colours: dict[int, list[np.ndarray]] = {}
    for index in range(60):
        scene = draw_scene(np.random.default_rng([3, index]), 64, 64)
        for number, label in enumerate(scene.label_ids.tolist(), start=1):
            colours.setdefault(label, []).append(scene.image[scene.segment_map == number].mean(axis=0))
    things = [np.array(colours[label]) for label in (4, 5, 6)]
    for first in things:
        for second in things:
            assert (np.abs(first.mean(axis=0) - second.mean(axis=0)) < second.std(axis=0)).all()


def test_rows_hold_the_same_truth_as_samples() -> None:
    data = load("scenes", length=2, image_size=(64, 80))
    row = data.row(1)
    assert set(row) == set(FEATURES)
    FEATURES.encode_example(row)
    masks, class_labels, _ = targets_for_task(row, "panoptic", data.label_spec)
    sample = data.sample(1)
    np.testing.assert_array_equal(masks, sample.masks)
    np.testing.assert_array_equal(class_labels, sample.class_labels)
    np.testing.assert_array_equal(SegmentationData.image(data, 1), sample.image)


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_references_agree_with_samples(task: str) -> None:
    data = load("scenes", task=task, length=3, image_size=64)
    sample, reference = data.sample(2), data.reference(2)
    if task == "semantic":
        for mask, label in zip(sample.masks, sample.class_labels, strict=True):
            np.testing.assert_array_equal(reference == label, mask)
    elif task == "instance":
        np.testing.assert_array_equal([decode_rle(rle) for rle in reference["masks"]], sample.masks)
        assert reference["labels"].tolist() == sample.class_labels.tolist()
    else:
        labels = {segment["id"]: segment["label_id"] for segment in reference["segments_info"]}
        for mask, label in zip(sample.masks, sample.class_labels, strict=True):
            assert {labels[value] for value in np.unique(reference["segmentation"][mask])} == {label}


def test_amodal_masks_overlap() -> None:
    seen = load("scenes", task="instance", length=20, image_size=64)
    whole = load("scenes", task="instance", length=20, image_size=64, amodal=True)
    assert all(seen.sample(index).masks.sum(axis=0).max() == 1 for index in range(20))
    assert max(whole.sample(index).masks.sum(axis=0).max() for index in range(20)) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "holdout"}, "scenes have no split 'holdout', allowed: train, val, test"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"image_size": 8}, "image_size must be at least 32"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"amodal": True}, "the panoptic task excludes"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("scenes", **options)


def test_index_out_of_range() -> None:
    with pytest.raises(IndexError, match="scene 3 of 3"):
        load("scenes", length=3).sample(3)
