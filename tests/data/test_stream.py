"""Streamed data: the rows of an index, in order, and training samples that come once over all readers."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from torch.utils.data import DataLoader

from data.hub_sets import (
    cell,
    object_set,
    objects,
    parquet_folder,
    photo,
    rectangle,
    semantic_map,
    semantic_set,
)
from hf_maskformer.data.augment import TrainAugmentation
from hf_maskformer.data.augment_presets import augmentation_preset
from hf_maskformer.data.collate import Collator
from hf_maskformer.data.hub import load_hub
from hf_maskformer.data.row_stream import RowStream
from hf_maskformer.data.segmentation_data import SegmentationData
from hf_maskformer.data.stream import TrainingStream
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor

NAMES = {0: "road", 1: "car"}
COUNT = 11


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven images in three files."""
    return parquet_folder(tmp_path / "set", shards=3, train=semantic_set(COUNT))


def streamed(folder: Path, **options: Any) -> SegmentationData:
    return load_hub(folder, "train", None, {"id2label": NAMES, "streaming": True, **options})


def numbers(samples: Any) -> list[int]:
    """Which photo each sample is: its colour is its number."""
    return [int(sample.image[0, 0, 0]) for sample in samples]


def identity(samples: list[Any]) -> list[Any]:
    return samples


def read(stream: TrainingStream, workers: int) -> list[int]:
    loader = DataLoader(stream, batch_size=2, num_workers=workers, collate_fn=identity)
    return numbers(sample for batch in loader for sample in batch)


@pytest.mark.parametrize("kind", ["semantic", "objects"])
def test_streamed_rows_are_those_of_the_index(tmp_path, kind):
    data = semantic_set(5) if kind == "semantic" else object_set(5)
    folder = parquet_folder(tmp_path / "set", shards=2, train=data)
    options = {"id2label": ["a", "b"], "cache_dir": str(tmp_path / "cache")}
    indexed = load_hub(folder, "train", None, options)
    stream = load_hub(folder, "train", None, {**options, "streaming": True})
    assert list(stream.rows()) == list(indexed.rows())
    assert list(stream.rows()) == list(indexed.rows())  # a stream can be read again
    assert stream.label_spec == indexed.label_spec
    for ours, theirs in zip(stream.samples(), indexed.samples(), strict=True):
        np.testing.assert_array_equal(ours.masks, theirs.masks)
        np.testing.assert_array_equal(ours.class_labels, theirs.class_labels)
        np.testing.assert_array_equal(ours.image, theirs.image)


def test_a_saved_set_is_streamed_too(tmp_path):
    semantic_set(3).save_to_disk(str(tmp_path / "saved"))
    data = load_hub(tmp_path / "saved", None, None, {"id2label": NAMES, "streaming": True})
    assert numbers(data.samples()) == [0, 1, 2]


def test_streaming_writes_no_index_and_needs_the_classes(folder, tmp_path):
    cache = tmp_path / "cache"
    assert numbers(streamed(folder, cache_dir=str(cache)).samples()) == list(range(COUNT))
    assert not list(cache.rglob("*.arrow"))
    with pytest.raises(ValueError, match="the classes of streamed data must be given"):
        load_hub(folder, "train", None, {"streaming": True})


def test_only_what_is_read_is_in_memory(folder):
    """The first row comes before the second file is opened."""
    opened = []
    data = streamed(folder)
    original = data.dataset.make_row
    data.dataset.make_row = lambda raw, number, problems: opened.append(number) or original(raw, number, problems)
    rows = data.rows()
    next(rows)
    assert opened == [0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_comes_once_over_all_workers_and_processes(folder, workers, world_size):
    for epoch in (0, 1):
        found = []
        for rank in range(world_size):
            stream = TrainingStream(streamed(folder), seed=4, rank=rank, world_size=world_size)
            stream.set_epoch(epoch)
            found.append(read(stream, workers))
        assert sorted(number for part in found for number in part) == list(range(COUNT))
        assert all(found)


def test_the_order_depends_on_seed_and_epoch_only(folder):
    def order(seed: int, epoch: int) -> list[int]:
        stream = TrainingStream(streamed(folder), seed=seed)
        stream.set_epoch(epoch)
        return numbers(stream)

    assert order(0, 0) == order(0, 0)
    orders = [order(0, 0), order(0, 1), order(1, 0), list(range(COUNT))]
    assert len({tuple(found) for found in orders}) == 4


def test_the_buffer_bounds_how_far_a_sample_moves(tmp_path):
    folder = parquet_folder(tmp_path / "set", train=semantic_set(40))
    found = numbers(TrainingStream(streamed(folder, shuffle_buffer=4), seed=0))
    assert sorted(found) == list(range(40))
    assert found != list(range(40))
    assert all(number < place + 2 * 4 for place, number in enumerate(found))  # read in pieces of the buffer's size
    with pytest.raises(ValueError, match="shuffle_buffer is 0; it must be at least 1"):
        streamed(folder, shuffle_buffer=0)


def noise(sample: Any, rng: np.random.Generator) -> Any:
    """In place of an augmentation: the random numbers a sample is given."""
    sample.drawn = int(rng.integers(2**40))
    return sample


def test_augmentation_is_seeded_by_seed_epoch_process_worker_and_number(folder):
    def drawn(workers: int = 0, epoch: int = 0, **arguments: Any) -> dict[int, int]:
        stream = TrainingStream(streamed(folder), noise, **{"seed": 1, **arguments})
        stream.set_epoch(epoch)
        loader = DataLoader(stream, batch_size=None, num_workers=workers)
        return {int(sample.image[0, 0, 0]): sample.drawn for sample in loader}

    first = drawn()
    assert drawn() == first
    assert len(set(first.values())) == COUNT
    assert drawn(workers=2) == drawn(workers=2)
    assert len(set(drawn(workers=2).values())) == COUNT
    for other in (drawn(epoch=1), drawn(seed=2), drawn(rank=0, world_size=2), drawn(rank=1, world_size=2)):
        assert len(set(other.values())) == len(other)
    halves = [drawn(rank=rank, world_size=2) for rank in (0, 1)]
    assert not set(halves[0].values()) & set(halves[1].values())


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_samples_are_collated(folder, workers):
    stream = TrainingStream(streamed(folder), TrainAugmentation(crop_size=(4, 6)), seed=0)
    processor = HfMaskFormerImageProcessor(size={"max_height": 4, "max_width": 6}, id2label=NAMES, task="semantic")
    loader = DataLoader(stream, batch_size=3, num_workers=workers, collate_fn=Collator(processor))
    ids = []
    for batch in loader:
        assert batch["pixel_values"].shape[1:] == (3, 4, 6)
        assert len(batch["mask_labels"]) == len(batch["image_ids"])
        ids += batch["image_ids"]
    assert len(ids) == COUNT


def test_objects_of_the_sample_before_are_pasted(tmp_path):
    rows = [
        {"image": photo(n), "objects": [{**objects()[0], "segmentation": [rectangle(n, 0, n + 1, 6)], "bbox": None}]}
        for n in range(6)
    ]
    folder = parquet_folder(tmp_path / "set", train=Dataset.from_list(rows, features=object_set().features))
    data = load_hub(folder, "train", None, {"streaming": True})

    def counts(probability: float) -> list[int]:
        return [len(sample.class_labels) for sample in TrainingStream(data, copy_paste_probability=probability)]

    assert counts(0.0) == [1] * 6
    pasted = counts(1.0)
    assert pasted[0] == 1  # nothing came before
    assert set(pasted) == {1, 2}  # each object is chosen with probability one half
    assert counts(1.0) == pasted
    preset = augmentation_preset("copy-paste-coco-instance", (6, 8))
    assert TrainingStream(data, preset).copy_paste_probability == 1.0
    assert TrainingStream(data, preset, copy_paste_probability=0.0).copy_paste_probability == 0.0


def test_what_came_before_is_left_out_without_changing_the_rest(folder):
    stream = TrainingStream(streamed(folder), noise, seed=3)
    whole = list(stream.numbered_samples(0))
    rest = list(stream.numbered_samples(0, first=4))
    assert [number for number, _ in rest] == list(range(COUNT))
    assert [sample for _, sample in rest[:4]] == [None] * 4
    assert [sample.drawn for _, sample in rest[4:]] == [sample.drawn for _, sample in whole[4:]]


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_decoded_are_raised_or_skipped(tmp_path, workers, caplog):
    """The header is whole, so the row can be made: the pixels are missing."""
    data = semantic_set(6)
    rows = [{"image": photo(number), "label": cell(semantic_map(number))} for number in range(6)]
    rows[2]["image"]["bytes"] = rows[2]["image"]["bytes"][:50]
    bad = Dataset.from_list(rows, features=data.features)
    folder = parquet_folder(tmp_path / "set", shards=2, train=bad)
    with pytest.raises(ValueError, match=r"2\.png: cannot be read as an image"):
        read(TrainingStream(streamed(folder), seed=0), workers)
    with caplog.at_level(logging.WARNING):
        found = read(TrainingStream(streamed(folder, on_bad_sample="skip"), seed=0, on_bad_sample="skip"), workers)
    assert sorted(found) == [0, 1, 3, 4, 5]
    if workers == 0:
        assert "a sample is skipped: 2.png: cannot be read as an image" in caplog.text
        numbered = TrainingStream(streamed(folder), seed=0, on_bad_sample="skip").numbered_samples(0, first=2)
        assert [number for number, _ in numbered] == [0, 1, 2, 3, 4]


@pytest.fixture
def half_bad(tmp_path: Path) -> Path:
    """Six images in two files; of the second none can be read."""
    data = semantic_set(6)
    rows = [{"image": photo(number), "label": cell(semantic_map(number))} for number in range(6)]
    for row in rows[3:]:
        row["image"]["bytes"] = b"none"
    return parquet_folder(tmp_path / "bad_set", shards=2, train=Dataset.from_list(rows, features=data.features))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_reader_that_can_read_nothing_does_not_stop_the_others(half_bad, workers, world_size):
    found = []
    for rank in range(world_size):
        data = streamed(half_bad, on_bad_sample="skip")
        found += read(TrainingStream(data, on_bad_sample="skip", rank=rank, world_size=world_size), workers)
    assert sorted(found) == [0, 1, 2]


def test_rows_of_a_shuffled_stream_are_named_by_their_place_in_the_files(half_bad, folder, caplog):
    with caplog.at_level(logging.WARNING):
        list(TrainingStream(streamed(half_bad, on_bad_sample="skip"), on_bad_sample="skip", seed=1))
    named = {record.message.partition(" (image)")[0].partition("set ")[2] for record in caplog.records}
    assert named == {f"train row {number} of shard 1" for number in range(3)}
    loader = DataLoader(TrainingStream(streamed(folder), seed=2), batch_size=None, num_workers=2)
    ids = {int(sample.image[0, 0, 0]): sample.image_id for sample in loader}
    assert ids == {n: f"{n} of shard 0" for n in range(4)} | {4 + n: f"{n} of shard 1" for n in range(4)} | {
        8 + n: f"{n} of shard 2" for n in range(3)
    }


def test_arguments_that_do_not_fit_are_refused(folder, tmp_path):
    indexed = load_hub(folder, "train", None, {"id2label": NAMES, "cache_dir": str(tmp_path / "cache")})
    with pytest.raises(ValueError, match="data is not streamed: load it with streaming=True"):
        TrainingStream(indexed)
    with pytest.raises(ValueError, match=r"rank is 2; it must be in 0\.\.world_size - 1 = 1"):
        TrainingStream(streamed(folder), rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"copy_paste_probability is 0\.5, but the task is semantic"):
        TrainingStream(streamed(folder), copy_paste_probability=0.5)
    with pytest.raises(ValueError, match="on_bad_sample 'list' is not allowed"):
        RowStream([], dict, "set", on_bad_sample="list")


def test_problems_of_a_stream_are_counted_not_kept(caplog):
    def make_row(raw: int, number: int, problems: Any) -> dict[str, Any]:
        problems.warning("empty_mask", "set", f"row {raw} has an empty mask")
        return {"number": raw}

    with caplog.at_level(logging.WARNING):
        assert len(list(RowStream(range(30), make_row, "owner/name train"))) == 30
    assert len(caplog.records) == 6
    assert "owner/name train: 25 more problems of the kind empty_mask" in caplog.text
