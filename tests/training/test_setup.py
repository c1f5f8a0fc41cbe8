"""What a configuration passes on to the data and to the processor that is saved with the model."""

from pathlib import Path

import numpy as np
import pytest
from datasets import List, Value
from PIL import Image

from data.hub_sets import one_row, parquet_folder
from hf_maskformer.data.augment import TrainAugmentation
from hf_maskformer.data.load import load
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor
from hf_maskformer.model.masks import encode_rle
from hf_maskformer.training.config import TrainConfig
from hf_maskformer.training.setup import (
    build_augmentation,
    build_model,
    load_splits,
    open_epoch,
    training_processor,
    val_options,
)


def semantic_folder(root: Path) -> Path:
    """Three grey images of 16 bits with labels 0 and 1; the first image file is empty."""
    for part in ("images", "labels"):
        (root / "train" / part).mkdir(parents=True)
    deep = np.full((8, 8), 2047, dtype=np.uint16)
    for number in range(3):
        Image.fromarray(deep).save(root / "train" / "images" / f"{number}.png")
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(root / "train" / "labels" / f"{number}.png")
    (root / "train" / "images" / "0.png").write_bytes(b"")
    return root


def test_bad_samples_and_the_intensity_range_reach_data_and_processor(tmp_path: Path) -> None:
    config = TrainConfig(
        max_steps=1,
        preset="maskformer-light",
        dataset=str(semantic_folder(tmp_path / "set")),
        dataset_options={"cache_dir": str(tmp_path / "cache")},
        task="semantic",
        val_split=None,
        on_bad_sample="skip",
        intensity_range=(0, 4094),
    )
    data, _ = load_splits(config)
    assert len(data) == 2
    assert np.unique(data.image(0)).tolist() == [128]
    _, processor = build_model(config, data, None)
    assert processor.intensity_range == (0.0, 4094.0)
    assert np.all(processor(np.full((8, 8), 4094, dtype=np.uint16))["pixel_values"][0, 0, 0, 0].numpy() > 2)


@pytest.mark.parametrize("sides", [[64, 96], [96, 64]])
def test_images_are_resized_by_their_shorter_side(sides: list[int]) -> None:
    config = TrainConfig(
        max_steps=1,
        preset="maskformer-light",
        dataset_options={"length": 1},
        val_split=None,
        image_resize="shortest_edge",
        config_overrides={"image_size": sides},
    )
    data, _ = load_splits(config)
    model, made = build_model(config, data, None)
    assert model.config.image_size == sides
    assert dict(made.size) == {"shortest_edge": 64, "longest_edge": 96}
    for size, seen in (((20, 20), (64, 64)), ((40, 50), (64, 96)), ((300, 100), (96, 32))):
        assert made(np.zeros((*size, 3), dtype=np.uint8))["pixel_values"].shape[-2:] == seen  # padded to 32
    assert build_augmentation(config, made).crop_size == (64, 64)
    wide = TrainConfig(max_steps=1, image_resize="shortest_edge", crop_size=(32, 48))
    assert build_augmentation(wide, made).crop_size == (32, 48)
    assert dict(training_processor(made, (32, 48)).size) == {"max_height": 32, "max_width": 48}
    assert dict(training_processor(made, None).size) == {"shortest_edge": 64, "longest_edge": 96}


def processor(height: int = 64, width: int = 96) -> HfMaskFormerImageProcessor:
    return HfMaskFormerImageProcessor(size={"max_height": height, "max_width": width})


def test_without_a_name_the_augmentation_is_the_plain_one_on_the_canvas() -> None:
    assert build_augmentation(TrainConfig(max_steps=1), processor()) == TrainAugmentation((64, 96))
    config = TrainConfig(max_steps=1, crop_size=(32, 48), scale_range=(0.8, 1.2), color_jitter=False)
    expected = TrainAugmentation((32, 48), (0.8, 1.2), color_jitter=False)
    assert build_augmentation(config, processor()) == expected


def test_fields_that_are_set_override_the_published_augmentation() -> None:
    config = TrainConfig(
        max_steps=1,
        augmentation="mask2former-coco",
        crop_size=(64, 64),
        color_jitter=True,
        vertical_flip_probability=0.5,
        copy_paste_probability=0.25,
    )
    expected = TrainAugmentation(
        (64, 64), (0.1, 2.0), color_jitter=True, vertical_flip_probability=0.5, copy_paste_probability=0.25
    )
    assert build_augmentation(config, processor()) == expected
    config = TrainConfig(max_steps=1, augmentation="maskformer-ade20k-semantic", scale_range=(0.5, 1.0))
    assert build_augmentation(config, processor()) == TrainAugmentation((512, 512), (0.5, 1.0))


def test_an_augmentation_without_a_fixed_crop() -> None:
    config = TrainConfig(max_steps=1, augmentation="maskformer-coco-panoptic", scale_range=(0.5, 1.0))
    with pytest.raises(ValueError, match=r"'maskformer-coco-panoptic' has no crop .* scale_range cannot be \(0\.5, 1"):
        build_augmentation(config, processor())
    config.scale_range = None
    augmentation = build_augmentation(config, processor())
    padded = training_processor(processor(), augmentation.crop_size)
    images = [np.zeros((70, 40, 3), np.uint8), np.zeros((50, 97, 3), np.uint8)]
    assert padded(images, do_resize=False)["pixel_values"].shape == (2, 3, 96, 128)  # 70 and 97, up to 32's multiples


def test_an_epoch_pastes_as_often_as_its_augmentation_says() -> None:
    data = load("scenes", task="instance", length=1, image_size=64)
    augmentation = TrainAugmentation((32, 32), copy_paste_probability=0.5)
    assert open_epoch(data, augmentation, 0, "raise", 0).copy_paste_probability == 0.5


@pytest.mark.parametrize(
    "options", [{"dataset_options": {"task": "semantic"}}, {"val_dataset_options": {"split": "x"}}]
)
def test_an_option_with_its_own_field_is_refused(options):
    with pytest.raises(ValueError, match=r"dataset option (task='semantic'|split='x'): set the field"):
        load_splits(TrainConfig(max_steps=1, **options))


def test_the_val_split_is_read_as_the_training_split_unless_it_says_otherwise():
    options = {"length": 9, "seed": 1, "streaming": True, "ignore_index": 0, "thing_labels": ["car"], "columns": {}}
    config = TrainConfig(max_steps=1, dataset_options=options)
    assert val_options(config) == {"ignore_index": 0, "thing_labels": ["car"], "columns": {}}
    config.val_dataset_options = {"ignore_index": 7, "thing_label_ids": [1], "length": 3}
    assert val_options(config) == {"ignore_index": 7, "thing_label_ids": [1], "length": 3, "columns": {}}


def test_reader_options_reach_the_val_split(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for part in ("images", "labels"):
            (tmp_path / "set" / split / part).mkdir(parents=True)
        for part, values in (("images", np.zeros((4, 4), np.uint8)), ("labels", np.eye(4, dtype=np.uint8) * 7 + 1)):
            Image.fromarray(values).save(tmp_path / "set" / split / part / f"{split}.png")
    options = {"label_table": {"1": "road", "8": "car"}, "cache_dir": str(tmp_path / "cache")}
    config = TrainConfig(max_steps=1, dataset=str(tmp_path / "set"), dataset_options=options)
    train_data, val_data = load_splits(config)
    assert val_data is not None
    np.testing.assert_array_equal(val_data.reference(0), train_data.reference(0))


def test_splits_with_other_things_are_refused(tmp_path: Path) -> None:
    feature = List({"category": Value("int64"), "rle": Value("string")})
    objects = [{"category": 0, "rle": encode_rle(np.eye(6, 8, dtype=bool))["counts"]}]
    data = one_row({"objects": feature}, objects=objects)
    folder = parquet_folder(tmp_path / "set", train=data, val=data)
    options = {"id2label": ["road", "car"], "thing_labels": ["car"], "cache_dir": str(tmp_path / "cache")}
    config = TrainConfig(max_steps=1, dataset=str(folder), dataset_options=options)
    load_splits(config)
    config.val_dataset_options = {"thing_labels": ["road"]}
    with pytest.raises(ValueError, match=r"things .* of val are \['road'\]; those of train are \['car'\]"):
        load_splits(config)
