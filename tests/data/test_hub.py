"""Data sets read by `datasets`: every kind of truth by hand-made values, classes, splits, caching, what is refused."""

import io
import json
import logging
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError
from PIL import Image as PILImage

from data.hub_sets import (
    CLASSES,
    HEIGHT,
    MASKS,
    OBJECT,
    WIDTH,
    cell,
    object_set,
    objects,
    one_row,
    parquet_folder,
    photo,
    png,
    semantic_map,
    semantic_set,
)
from hf_maskformer.data import hub, hub_labels
from hf_maskformer.data.hub import choose_split, hub_source, load_hub
from hf_maskformer.data.problems import Problems
from hf_maskformer.data.segmentation_data import SegmentationData
from hf_maskformer.model.masks import decode_rle, encode_rle, ids_to_panoptic_png

NAMES = {0: "road", 1: "car"}
SEGMENT = {"id": Value("int64"), "category_id": Value("int64"), "iscrowd": Value("int64"), "isthing": Value("int64")}


@pytest.fixture
def load_set(tmp_path: Path) -> Callable[..., SegmentationData]:
    """Saves a data set with `save_to_disk` and loads it."""

    def load(data: Dataset, task: str | None = None, **options: Any) -> SegmentationData:
        folder = tmp_path / "saved" / str(len(list(tmp_path.glob("saved/*"))))
        data.save_to_disk(str(folder))
        return load_hub(folder, None, task, {"cache_dir": str(tmp_path / "cache"), **options})

    return load


def masks_of(row: dict[str, Any]) -> np.ndarray:
    size = [row["height"], row["width"]]
    return np.stack([decode_rle({"size": size, "counts": segment["rle"]}) for segment in row["segments"]])


def fields_of(row: dict[str, Any], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(segment[name] for name in names) for segment in row["segments"]]


# --- kinds of truth --------------------------------------------------------------------------------------------------


def test_a_semantic_map(load_set):
    data = load_set(semantic_set(1), id2label=NAMES)
    row, labels = data.row(0), semantic_map()
    assert (data.task, data.format, len(data)) == ("semantic", "hub", 1)
    assert (row["height"], row["width"], row["file_name"], row["image_id"]) == (HEIGHT, WIDTH, "0.png", "0")
    assert fields_of(row, "id", "label_id", "iscrowd", "area") == [(1, 0, False, 23.0), (2, 1, False, 24.0)]
    np.testing.assert_array_equal(masks_of(row), [labels == 0, labels == 1])
    assert row["segments"][1]["bbox"] == [4.0, 0.0, 4.0, 6.0]
    np.testing.assert_array_equal(data.reference(0), labels)
    np.testing.assert_array_equal(data.sample(0).image, np.zeros((HEIGHT, WIDTH, 3)))


def test_reduced_labels_make_zero_void(load_set):
    labels = np.array([[0, 1, 2], [255, 2, 2]], dtype=np.uint8)
    image = cell(np.zeros((2, 3, 3), dtype=np.uint8))
    data = Dataset.from_list([{"image": image, "label": cell(labels)}], Features({"image": Image(), "label": Image()}))
    found = load_set(data, reduce_labels=True, id2label=NAMES)
    np.testing.assert_array_equal(found.reference(0), [[255, 0, 1], [255, 1, 1]])
    inferred = load_set(data, reduce_labels=True)
    np.testing.assert_array_equal(inferred.reference(0), [[255, 0, 1], [255, 1, 1]])
    assert inferred.label_spec.id2label == {0: "label_0", 1: "label_1"}


def test_class_numbers_with_gaps_become_labels_and_a_void_of_zero_is_void(load_set):
    labels = np.array([[0, 3, 7], [7, 7, 3]], dtype=np.uint8)
    image = cell(np.zeros((2, 3, 3), dtype=np.uint8))
    data = Dataset.from_list([{"image": image, "label": cell(labels)}], Features({"image": Image(), "label": Image()}))
    found = load_set(data, id2label={"7": "car", "3": "road"}, ignore_index=0)
    assert found.label_spec.id2label == {0: "road", 1: "car"}
    np.testing.assert_array_equal(found.reference(0), [[255, 0, 1], [1, 1, 0]])


def test_a_label_map_in_colour_needs_a_table(load_set):
    colours = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    colours[:, :3] = (128, 64, 128)
    colours[0, :3] = (0, 0, 142)
    data = one_row({"label": Image()}, label=cell(colours))
    table = {"128,64,128": "road", "0,0,142": "car", "0,0,0": None}
    found = load_set(data, label_table=table)
    expected = np.full((HEIGHT, WIDTH), 255)
    expected[:, :3] = 0
    expected[0, :3] = 1
    np.testing.assert_array_equal(found.reference(0), expected)
    with pytest.raises(ValueError, match=r"row 0 \(label\): a label map in colour"):
        load_set(data, id2label=NAMES)
    with pytest.raises(ValueError, match=r"row 0 \(label\): 1 colour\(s\) are not in label_table: #00008e"):
        load_set(data, label_table={"128,64,128": "road", "0,0,0": None})


PANOPTIC_IDS = np.full((HEIGHT, WIDTH), 5, dtype=np.int32)
PANOPTIC_IDS[0:2, 0:2] = 70000
PANOPTIC_IDS[3:5, 3:5] = 300
PANOPTIC_IDS[5, 0] = 0
PANOPTIC_INFO = [
    {"id": 70000, "category_id": 1, "iscrowd": 0, "isthing": 1},
    {"id": 300, "category_id": 1, "iscrowd": 1, "isthing": 1},
    {"id": 5, "category_id": 0, "iscrowd": 0, "isthing": 0},
]


def panoptic_set(info: list[dict[str, Any]] = PANOPTIC_INFO, ids: np.ndarray = PANOPTIC_IDS) -> Dataset:
    features = {"panoptic": Image(), "segments_info": List({name: SEGMENT[name] for name in info[0]})}
    return one_row(features, panoptic=cell(ids_to_panoptic_png(ids)), segments_info=info)


def test_a_panoptic_map_with_segments_info(load_set):
    data = load_set(panoptic_set(), id2label=NAMES)
    row = data.row(0)
    assert (data.task, data.label_spec.thing_label_ids) == ("panoptic", (1,))
    assert fields_of(row, "id", "label_id", "iscrowd") == [(70000, 1, False), (300, 1, True), (5, 0, False)]
    np.testing.assert_array_equal(masks_of(row), [value == PANOPTIC_IDS for value in (70000, 300, 5)])
    np.testing.assert_array_equal(data.reference(0)["segmentation"], PANOPTIC_IDS)
    assert load_set(panoptic_set(), "instance", id2label=NAMES).sample(0).class_labels.tolist() == [1]


def test_panoptic_ids_in_one_channel_are_the_same(load_set):
    ids = np.where(PANOPTIC_IDS == 70000, 7, np.where(PANOPTIC_IDS == 300, 9, PANOPTIC_IDS)).astype(np.uint8)
    info = [{**record, "id": {70000: 7, 300: 9, 5: 5}[record["id"]]} for record in PANOPTIC_INFO]
    features = {"panoptic": Image(), "segments_info": List(SEGMENT)}
    data = load_set(one_row(features, panoptic=cell(ids), segments_info=info), id2label=NAMES)
    np.testing.assert_array_equal(data.reference(0)["segmentation"], ids)


def test_things_must_be_said_where_segments_do_not_say_them(load_set):
    info = [{name: record[name] for name in ("id", "category_id")} for record in PANOPTIC_INFO]
    with pytest.raises(ValueError, match=r"does not say which classes are things .* classes: road, car"):
        load_set(panoptic_set(info), id2label=NAMES)
    assert load_set(panoptic_set(info), "semantic", id2label=NAMES).label_spec.thing_label_ids == ()
    assert load_set(panoptic_set(info), id2label=NAMES, thing_labels=["car"]).label_spec.thing_label_ids == (1,)
    assert load_set(panoptic_set(info), id2label=NAMES, thing_label_ids=[0, 1]).label_spec.thing_label_ids == (0, 1)
    with pytest.raises(ValueError, match="thing 'bus' is no class, allowed: road, car"):
        load_set(panoptic_set(info), id2label=NAMES, thing_labels=["bus"])
    different = [{**record, "isthing": int(record["id"] == 300)} for record in PANOPTIC_INFO]
    with pytest.raises(ValueError, match="segments of one class have different isthing"):
        load_set(panoptic_set(different), id2label=NAMES)


def test_an_instance_map_over_a_semantic_map(load_set):
    labels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    labels[:, 4:] = 1
    labels[5, 5] = 255
    instances = np.zeros((HEIGHT, WIDTH), dtype=np.uint16)
    instances[0:2, 4:6] = 3
    instances[4:6, 4:6] = 900  # one of its pixels is void
    data = one_row({"instance": Image(), "label": Image()}, instance=cell(instances), label=cell(labels))
    found = load_set(data, id2label=NAMES, thing_labels=["car"])
    row = found.row(0)
    # Cars without an instance are a crowd, the road is one segment.
    assert fields_of(row, "label_id", "iscrowd") == [(1, False), (1, False), (0, False), (1, True)]
    assert fields_of(row, "id") == [(1,), (2,), (3,), (4,)]
    rest = (labels == 1) & (instances == 0)
    np.testing.assert_array_equal(masks_of(row), [instances == 3, instances == 900, labels == 0, rest])
    assert found.task == "panoptic"
    instances[0, 0] = 3
    broken = one_row({"instance": Image(), "label": Image()}, instance=cell(instances), label=cell(labels))
    with pytest.raises(ValueError, match=r"\(instance\): object 3 lies on 'road', 'car'; it must lie on one class"):
        load_set(broken, id2label=NAMES, thing_labels=["car"])


def test_classes_in_red_and_instances_in_green(load_set):
    """The coding of the data set of transformers' instance segmentation example, with 0 = background."""
    coded = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    coded[0:2, 0:2] = (1, 1, 0)
    coded[0:2, 4:6] = (1, 2, 0)
    coded[3:5, 0:2] = (2, 1, 0)  # counted anew within its class
    columns = {"instance_map": "annotation"}
    data = one_row({"annotation": Image()}, annotation=cell(coded))
    found = load_set(data, columns=columns, reduce_labels=True, id2label={0: "person", 1: "car"})
    row = found.row(0)
    assert found.task == "instance"
    assert fields_of(row, "label_id", "iscrowd") == [(0, False), (0, False), (1, False)]
    expected = [(coded[..., 0] == red) & (coded[..., 1] == green) for red, green in ((1, 1), (1, 2), (2, 1))]
    np.testing.assert_array_equal(masks_of(row), expected)
    coded[5, 5] = (0, 0, 7)
    with pytest.raises(ValueError, match="but this one has values in the third channel"):
        load_set(one_row({"annotation": Image()}, annotation=cell(coded)), columns=columns, id2label=NAMES)
    with pytest.raises(ValueError, match="but this one has one channel"):
        load_set(one_row({"annotation": Image()}, annotation=cell(coded[..., 0])), columns=columns, id2label=NAMES)


@pytest.mark.parametrize("layout", ["list of structs", "struct of lists"])
def test_coco_objects_keep_overlap_crowds_and_areas(load_set, layout):
    records = objects()
    records[0]["area"] = 15.5
    feature: Any = List(OBJECT)
    value: Any = records
    if layout == "struct of lists":
        feature = {name: List(field) for name, field in OBJECT.items()}
        value = {name: [record[name] for record in records] for name in OBJECT}
    data = load_set(one_row({"objects": feature}, objects=value))
    row = data.row(0)
    assert data.task == "instance"
    assert data.label_spec.id2label == {0: "cat", 1: "dog"}
    assert data.label_spec.thing_label_ids == (0, 1)
    assert fields_of(row, "id", "label_id", "iscrowd", "area") == [
        (10, 1, False, 15.5),
        (11, 0, False, 16.0),
        (12, 1, True, 1.0),
    ]
    np.testing.assert_array_equal(masks_of(row), MASKS)
    assert data.sample(0).class_labels.tolist() == [1, 0]  # crowds are not learned


def test_objects_as_run_length_codes_and_flat_polygons(load_set):
    rle = {"size": List(Value("int64")), "counts": Value("string")}
    feature = List({"category_id": Value("int64"), "segmentation": rle})
    records = [{"category_id": 0, "segmentation": encode_rle(mask)} for mask in MASKS]
    np.testing.assert_array_equal(masks_of(load_set(one_row({"objects": feature}, objects=records)).row(0)), MASKS)
    feature = List({"category_id": Value("int64"), "rle": Value("string")})
    records = [{"category_id": 0, "rle": encode_rle(mask)["counts"]} for mask in MASKS]
    data = load_set(one_row({"objects": feature}, objects=records))
    np.testing.assert_array_equal(masks_of(data.row(0)), MASKS)
    assert fields_of(data.row(0), "id", "area") == [(1, 16.0), (2, 16.0), (3, 1.0)]
    feature = List({"category_id": Value("int64"), "polygons": List(Value("float32"))})
    records = [{"category_id": 0, "polygons": record["segmentation"][0]} for record in objects()]
    np.testing.assert_array_equal(masks_of(load_set(one_row({"objects": feature}, objects=records)).row(0)), MASKS)


def test_an_image_without_objects_is_a_row_without_segments(load_set):
    features = Features({"image": Image(), "objects": List(OBJECT)})
    rows = [{"image": photo(0), "objects": []}, {"image": photo(1), "objects": None}]
    data = load_set(Dataset.from_list(rows, features=features))
    assert [row["segments"] for row in data.rows()] == [[], []]


def test_mask_images_keep_overlap(load_set):
    features = {"masks": List(Image()), "labels": List(CLASSES)}
    cells = [cell(mask.astype(np.uint8) * 255) for mask in MASKS]
    data = load_set(one_row(features, masks=cells, labels=[1, 0, 1]))
    np.testing.assert_array_equal(masks_of(data.row(0)), MASKS)
    assert fields_of(data.row(0), "id", "label_id") == [(1, 1), (2, 0), (3, 1)]
    with pytest.raises(ValueError, match=r"\(masks\) has 3 masks, but .*\(labels\) 2 labels"):
        load_set(one_row(features, masks=cells, labels=[1, 0]))


# --- classes ---------------------------------------------------------------------------------------------------------


def test_classes_given_as_text_are_found_and_named(load_set, caplog):
    features = {"masks": List(Image()), "labels": List(Value("string"))}
    cells = [cell(mask.astype(np.uint8)) for mask in MASKS]
    with caplog.at_level(logging.WARNING):
        data = load_set(one_row(features, masks=cells, labels=["dog", "cat", "dog"]))
    assert data.label_spec.id2label == {0: "cat", 1: "dog"}
    assert fields_of(data.row(0), "label_id") == [(1,), (0,), (1,)]
    assert "no class names are given: the 2 names found in all splits are taken" in caplog.text
    named = load_set(one_row(features, masks=cells, labels=["dog", "cat", "dog"]), id2label=["dog", "cat"])
    assert fields_of(named.row(0), "label_id") == [(0,), (1,), (0,)]


def test_id2label_from_a_file_beside_the_data_and_from_a_path(tmp_path):
    folder = parquet_folder(tmp_path / "set", train=semantic_set())
    options = {"cache_dir": str(tmp_path / "cache")}
    assert load_hub(folder, "train", None, options).label_spec.id2label == {0: "label_0", 1: "label_1"}
    (folder / "id2label.json").write_text(json.dumps({"0": "road", "1": "car"}))
    assert load_hub(folder, "train", None, options).label_spec.id2label == NAMES
    other = tmp_path / "names.json"
    other.write_text(json.dumps(["a", "b"]))
    named = load_hub(folder, "train", None, {**options, "id2label": str(other)})
    assert named.label_spec.id2label == {0: "a", 1: "b"}
    other.write_text("{")
    with pytest.raises(ValueError, match=r"names\.json: is not valid JSON"):
        load_hub(folder, "train", None, {**options, "id2label": str(other)})
    with pytest.raises(ValueError, match=r"id2label is \{'road': 0\}; it must name each class number"):
        load_hub(folder, "train", None, {**options, "id2label": {"road": 0}})


def test_inferred_classes_are_those_of_all_splits_and_have_no_gap(tmp_path):
    cars = np.full((HEIGHT, WIDTH), 2, dtype=np.uint8)
    val = one_row({"label": Image()}, label=cell(cars))
    test = one_row({"label": Image()}, label=None)  # no truth, as is usual for test splits
    folder = parquet_folder(tmp_path / "set", train=semantic_set(), val=val, test=test)
    options = {"cache_dir": str(tmp_path / "cache")}
    for _ in range(2):  # found, and found again in the cache
        assert load_hub(folder, "train", None, options).label_spec.num_labels == 3
    gap = parquet_folder(tmp_path / "gap", train=val)
    with pytest.raises(ValueError, match=r"the classes found, \[2\], are not 0\.\.K-1 without a gap"):
        load_hub(gap, "train", None, options)
    ones = one_row({"label": Image()}, label=cell(cars - 1))
    with pytest.raises(ValueError, match=r"\[1\], .*; they look 1-based: reduce_labels=True"):
        load_hub(parquet_folder(tmp_path / "ones", train=ones), "train", None, options)


def test_options_that_do_not_fit_are_refused(load_set):
    with pytest.raises(ValueError, match="option 'colums' is not known for format hub, allowed: columns, "):
        load_set(semantic_set(), colums={})
    with pytest.raises(ValueError, match="reduce_labels and label_table are for label maps, not for objects"):
        load_set(object_set(), reduce_labels=True)
    with pytest.raises(ValueError, match="give thing_labels or thing_label_ids, not both"):
        load_set(object_set(), thing_labels=["cat"], thing_label_ids=[0])
    with pytest.raises(ValueError, match="thing_labels is 'cat'; it must be a list"):
        load_set(object_set(), thing_labels="cat")
    with pytest.raises(ValueError, match="ignore_index 1 is also the class 'car'"):
        load_set(semantic_set(), id2label=NAMES, ignore_index=1)
    with pytest.raises(
        ValueError, match=r"task 'panoptic' is not possible with the columns of .* \(objects\), allowed"
    ):
        load_set(object_set(), "panoptic")


# --- sources ---------------------------------------------------------------------------------------------------------


def test_parquet_folders_saved_sets_and_data_files_give_the_same_rows(tmp_path):
    data = object_set(3)
    folder = parquet_folder(tmp_path / "set", shards=2, train=data, validation=object_set(1))
    DatasetDict(train=data, validation=object_set(1)).save_to_disk(str(tmp_path / "both"))
    data.save_to_disk(str(tmp_path / "one"))
    options = {"cache_dir": str(tmp_path / "cache")}
    files = {"data_files": {"train": str(folder / "data" / "train-*.parquet")}}
    loaded = [
        load_hub(folder, "train", None, options),
        load_hub(tmp_path / "both", "train", None, options),
        load_hub(tmp_path / "one", "train", None, options),
        load_hub("parquet", None, None, {**options, **files}),
    ]
    rows = [list(data.rows()) for data in loaded]
    assert len(rows[0]) == 3
    assert all(other == rows[0] for other in rows)
    assert len(load_hub(folder, "val", None, options)) == 1  # "validation" there
    assert len(load_hub(folder, "train[:2]", None, options)) == 2


def test_images_are_indexed_without_being_decoded(load_set, monkeypatch):
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("an image was decoded by datasets")

    monkeypatch.setattr(Image, "decode_example", fail)
    data = load_set(object_set(2))
    assert data.row(1)["image"]["bytes"] == png(np.full((HEIGHT, WIDTH, 3), 1, dtype=np.uint8))
    assert data.sample(1).image[0, 0].tolist() == [1, 1, 1]


def image_folder(root: Path) -> Path:
    """An imagefolder as on the Hub: image files, and metadata.jsonl with the objects of each."""
    (root / "train").mkdir(parents=True)
    lines = []
    for number in range(2):
        (root / "train" / f"{number}.png").write_bytes(photo(number)["bytes"])
        lines.append(json.dumps({"file_name": f"{number}.png", "objects": objects()}))
    (root / "train" / "metadata.jsonl").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("streaming", [False, True])
def test_files_outside_the_arrow_table_stay_where_they_are(tmp_path, streaming):
    folder = image_folder(tmp_path / "set")
    options = {"id2label": ["cat", "dog"], "cache_dir": str(tmp_path / "cache"), "streaming": streaming}
    data = load_hub(folder, "train", None, options)
    rows = list(data.rows())
    assert [row["image"] for row in rows] == [
        {"bytes": None, "path": str(folder / "train" / f"{number}.png")} for number in range(2)
    ]
    assert data.row_image(rows[1])[0, 0].tolist() == [1, 1, 1]
    np.testing.assert_array_equal(masks_of(rows[1]), MASKS)
    (folder / "train" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1\.png: no such image file"):
        data.row_image(rows[1])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_webdataset_is_read(tmp_path, streaming):
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "train-0.tar", "w") as archive:
        for number in range(2):
            for ending, content in (("jpg", photo(number)["bytes"]), ("seg.png", png(semantic_map(number)))):
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    options = {"id2label": NAMES, "cache_dir": str(tmp_path / "cache"), "streaming": streaming}
    data = load_hub(tmp_path / "set", "train", None, options)
    for number, (_, reference) in enumerate(data.samples_with_references()):
        np.testing.assert_array_equal(reference, semantic_map(number))
    assert number == 1


def test_the_index_is_used_again_and_made_anew_when_data_or_options_change(tmp_path, monkeypatch):
    made = []
    original = hub.ColumnRows.__call__
    monkeypatch.setattr(hub.ColumnRows, "__call__", lambda *a: made.append(1) or original(*a))
    options = {"cache_dir": str(tmp_path / "cache"), "id2label": NAMES}
    folder = parquet_folder(tmp_path / "set", train=semantic_set(2))
    for expected in (2, 0):
        made.clear()
        load_hub(folder, "train", None, options)
        assert len(made) == expected
    made.clear()
    load_hub(folder, "train", None, {**options, "id2label": {0: "road", 1: "bus"}})
    assert len(made) == 2
    semantic_set(3).to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    assert len(load_hub(folder, "train", None, options)) == 3


@pytest.fixture
def opened_with(monkeypatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Replaces `load_dataset`; what it is called with."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def load_dataset(*arguments: Any, **keywords: Any) -> DatasetDict:
        calls.append((arguments, keywords))
        return DatasetDict(train=semantic_set())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_what_an_id_of_the_hub_passes_on(opened_with, tmp_path):
    options = {"config_name": "full", "revision": "abc", "cache_dir": tmp_path, "id2label": NAMES}
    data = load_hub("owner/name", "train", None, options)
    assert opened_with == [
        (("owner/name",), {"streaming": False, "name": "full", "revision": "abc", "cache_dir": str(tmp_path)})
    ]
    assert data.row(0)["file_name"] == "0.png"


def test_the_id2label_file_of_a_hub_repository_is_used_where_there_is_one(opened_with, monkeypatch, tmp_path, caplog):
    names = tmp_path / "id2label.json"
    names.write_text(json.dumps({"0": "road", "1": "car"}))
    asked = []

    def download(repo_id: str, filename: str, **keywords: Any) -> str:
        asked.append((repo_id, filename, keywords))
        return str(names)

    monkeypatch.setattr(hub_labels, "hf_hub_download", download)
    options = {"cache_dir": tmp_path, "revision": "abc"}
    assert load_hub("owner/name", "train", None, options).label_spec.id2label == NAMES
    assert asked == [("owner/name", "id2label.json", {"repo_type": "dataset", "revision": "abc"})]

    def absent(*arguments: Any, **keywords: Any) -> str:
        raise EntryNotFoundError("404")

    monkeypatch.setattr(hub_labels, "hf_hub_download", absent)
    with caplog.at_level(logging.INFO, logger="hf_maskformer"):
        assert load_hub("owner/name", "train", None, options).label_spec.id2label[0] == "label_0"
    assert "no id2label.json is used (EntryNotFoundError)" in caplog.text

    def broken(*arguments: Any, **keywords: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(hub_labels, "hf_hub_download", broken)
    with caplog.at_level(logging.WARNING):
        load_hub("owner/name", "train", None, options)
    assert "its id2label.json cannot be fetched: no route to host" in caplog.text


def raised_by_the_hub(error: Exception, cause: Exception | None = None) -> Callable[..., None]:
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise error from cause

    return fail


@pytest.mark.parametrize(
    ("error", "cause", "message"),
    [
        (DatasetNotFoundError("doesn't exist"), None, r"'owner/name' is not found .*; check the spelling"),
        (DatasetNotFoundError("is gated"), GatedRepoError.__new__(GatedRepoError), "ask for access on its page"),
        (ConnectionError("offline"), None, "cannot be fetched from the Hub .* check the network and HF_HUB_OFFLINE"),
        (
            RuntimeError("scripts are no longer supported"),
            None,
            "without running its own code",
        ),
        (ValueError("BuilderConfig 'x' not found"), None, "data set 'owner/name': BuilderConfig 'x' not found"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(monkeypatch, error, cause, message):
    monkeypatch.setattr(datasets, "load_dataset", raised_by_the_hub(error, cause))
    with pytest.raises(ValueError, match=message):
        load_hub("owner/name", "train")


def test_offline_ids_and_folders_without_data_are_named(tmp_path):
    with pytest.raises(ValueError, match="data set 'nobody/nothing' cannot be fetched from the Hub"):
        load_hub("nobody/nothing", "train")  # the tests run offline
    with pytest.raises(ValueError, match="has no files that `datasets` reads"):
        load_hub(tmp_path, "train")
    broken = parquet_folder(tmp_path / "set", train=semantic_set())
    (broken / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 this is none")
    with pytest.raises(ValueError, match=r"data set '.*set'"):
        load_hub(broken, "train", None, {"cache_dir": str(tmp_path / "cache")})


def test_splits_are_chosen_by_name_or_alias():
    assert choose_split("set", None, ["train"]) == "train"
    assert choose_split("set", "validation", ["train", "val"]) == "val"
    with pytest.raises(ValueError, match="set has several splits, choose one with split=: train, test"):
        choose_split("set", None, ["train", "test"])
    with pytest.raises(ValueError, match="set has no split 'val'; splits that exist: train, test"):
        choose_split("set", "val", ["train", "test"])


# --- bad rows --------------------------------------------------------------------------------------------------------


def with_row(bad: dict[str, Any]) -> Dataset:
    """A good row, then a bad one."""
    data = semantic_set(1)
    rows = [
        {"image": photo(), "label": cell(semantic_map())},
        {"image": photo(1), "label": cell(semantic_map()), **bad},
    ]
    return Dataset.from_list(rows, features=data.features)


BAD_ROWS = {
    "undecodable image": ({"image": {"bytes": b"none", "path": "x.png"}}, "unreadable_file", r"row 1 \(image\)"),
    "undecodable map": ({"label": {"bytes": png(semantic_map())[:40], "path": None}}, "unreadable_file", r"\(label\)"),
    "no image": ({"image": None}, "missing_file", r"row 1 \(image\): holds no image"),
    "unknown class": ({"label": cell(semantic_map() * 0 + 7)}, "unknown_label", r"row 1 \(label\): label 7 is not in"),
    "another size": ({"label": cell(semantic_map()[:4])}, "size_mismatch", r"row 1 \(label\) is 8x4 .* is 8x6"),
}


@pytest.mark.parametrize("name", list(BAD_ROWS))
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_are_raised_and_unreadable_ones_skipped(load_set, name, streaming, caplog):
    bad, kind, message = BAD_ROWS[name]
    options = {"id2label": NAMES, "streaming": streaming}
    with pytest.raises(ValueError, match=message):
        list(load_set(with_row(bad), **options).rows())
    if kind == "unreadable_file":
        with caplog.at_level(logging.WARNING):
            rows = list(load_set(with_row(bad), **options, on_bad_sample="skip").rows())
        assert [row["file_name"] for row in rows] == ["0.png"]
        assert "row 1" in caplog.text
    else:
        with pytest.raises(ValueError, match=message):
            list(load_set(with_row(bad), **options, on_bad_sample="skip").rows())


@pytest.mark.parametrize("name", list(BAD_ROWS))
def test_bad_rows_are_listed_and_reading_goes_on(tmp_path, name):
    bad, kind, _ = BAD_ROWS[name]
    with_row(bad).save_to_disk(str(tmp_path / "set"))
    problems = Problems("list")
    source = hub_source(tmp_path / "set", None, {"id2label": NAMES}, problems)
    rows = list(source.rows())
    assert rows[0]["file_name"] == "0.png"
    assert [problem.kind for problem in problems.found] == [kind]
    assert "row 1" in problems.found[0].file
    # Only the pixels of an unknown class are void, the row stays.
    assert len(rows) == (2 if name == "unknown class" else 1)


def test_nothing_but_unreadable_rows_is_an_error(load_set):
    bad = Dataset.from_list(
        [{"image": {"bytes": b"none", "path": None}, "label": cell(semantic_map())}], features=semantic_set().features
    )
    for streaming in (False, True):
        with pytest.raises(ValueError, match="none of the 1 rows can be read"):
            list(load_set(bad, id2label=NAMES, streaming=streaming, on_bad_sample="skip").rows())


def test_every_bad_object_is_listed_once_and_the_others_stay(tmp_path):
    records = [
        *objects(),
        {**objects()[0], "id": 20, "segmentation": [[0.0, 0.0, 1.0, 1.0]]},
        {**objects()[0], "id": 21, "segmentation": [rectangle_outside()]},
        {**objects()[0], "id": 22, "bbox": [0.0, 0.0, 8.0, 6.0]},
        {**objects()[1], "id": 10},
    ]
    one_row({"objects": List(OBJECT)}, objects=records).save_to_disk(str(tmp_path / "set"))
    problems = Problems("list")
    rows = list(hub_source(tmp_path / "set", None, {}, problems).rows())
    assert fields_of(rows[0], "id") == [(10,), (11,), (12,), (22,), (10,)]
    found = {(problem.kind, problem.message.split("(objects): ")[1][:14]) for problem in problems.found}
    assert found == {
        ("broken_mask", "object 20: pol"),
        ("empty_mask", "object 21 has "),
        ("box_mismatch", "object 22 has "),
        ("duplicate", "object id 10 s"),
        ("duplicate", "its objects: a"),
    }
    with pytest.raises(ValueError, match=r"row 0 \(objects\): object 20: polygon 0 must be"):
        load_hub(tmp_path / "set", None, None, {"cache_dir": str(tmp_path / "cache")})


def rectangle_outside() -> list[float]:
    return [20.0, 20.0, 24.0, 20.0, 24.0, 24.0]


def test_unknown_categories_and_panoptic_ids_are_found(tmp_path):
    feature = List({"category_id": Value("int64"), "rle": Value("string")})
    records = [{"category_id": value, "rle": encode_rle(MASKS[0])["counts"]} for value in (0, 5)]
    one_row({"objects": feature}, objects=records).save_to_disk(str(tmp_path / "objects"))
    problems = Problems("list")
    rows = list(hub_source(tmp_path / "objects", None, {"id2label": NAMES}, problems).rows())
    assert fields_of(rows[0], "id", "label_id") == [(1, 0)]
    assert [problem.kind for problem in problems.found] == ["unknown_label"]
    assert problems.found[0].message.endswith("row 0 (objects): object 2: class 5 is not known, allowed: 0, 1")

    info = [*PANOPTIC_INFO[1:], {**PANOPTIC_INFO[1]}, {**PANOPTIC_INFO[2], "id": 77}]
    panoptic_set(info).save_to_disk(str(tmp_path / "panoptic"))
    problems = Problems("list")
    rows = list(hub_source(tmp_path / "panoptic", None, {"id2label": NAMES}, problems).rows())
    assert fields_of(rows[0], "id") == [(300,), (5,)]
    assert [problem.kind for problem in problems.found] == ["duplicate", "empty_mask", "unlisted_segment"]
    assert "1 id(s) are not in segments_info, such as 70000" in problems.found[2].message


def test_images_turned_by_their_exif_orientation_have_the_turned_size(load_set):
    buffer = io.BytesIO()
    exif = PILImage.Exif()
    exif[0x0112] = 6
    PILImage.fromarray(np.zeros((WIDTH, HEIGHT, 3), dtype=np.uint8)).save(buffer, "JPEG", exif=exif)
    image = {"bytes": buffer.getvalue(), "path": "turned.jpg"}
    data = Dataset.from_list(
        [{"image": image, "label": cell(semantic_map())}], features=Features({"image": Image(), "label": Image()})
    )
    found = load_set(data, id2label=NAMES)
    assert found.sample(0).image.shape == (HEIGHT, WIDTH, 3)


def test_grey_maps_of_few_bits_keep_their_values(load_set):
    """PIL stretches 2-bit greyscale to 0..255; the class numbers must not be."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    lines = (b"\0" + bytes([0b00010110, 0b00010110])) * HEIGHT  # classes 0, 1, 1, 2 twice a line
    file = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    file.seek(0, 2)
    file.write(chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 2, 0, 0, 0, 0)))
    file.write(chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))
    data = one_row({"label": Image()}, label={"bytes": file.getvalue(), "path": None})
    found = load_set(data, id2label=["a", "b", "c"])
    np.testing.assert_array_equal(found.reference(0), np.tile([0, 1, 1, 2], (HEIGHT, 2)))


def test_class_label_numbers_beyond_the_names_are_unknown(load_set):
    features = {"masks": List(Image()), "labels": List(ClassLabel(names=["x"]))}
    data = one_row(features, masks=[cell(MASKS[0].astype(np.uint8))], labels=[0])
    assert load_set(data).label_spec.id2label == {0: "x"}
