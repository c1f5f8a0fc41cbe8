"""The classes of a `datasets` data set: given, found beside it or in its rows; what is refused."""

import json
import logging

import numpy as np
import pytest
from datasets import Image, List, Value

from data.hub_sets import (
    HEIGHT,
    MASKS,
    NAMES,
    WIDTH,
    cell,
    fields_of,
    object_set,
    one_row,
    parquet_folder,
    semantic_set,
)
from hf_maskformer.data.hub import load_hub


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
    other.write_text(json.dumps({"0": "c", "1": "d"}), encoding="utf-8-sig")
    assert load_hub(folder, "train", None, {**options, "id2label": str(other)}).label_spec.id2label[0] == "c"
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
    with pytest.raises(ValueError, match="ignore_index is '255'; it must be a whole number"):
        load_set(semantic_set(), id2label=NAMES, ignore_index="255")
    with pytest.raises(ValueError, match="ignore_index 1 is also the class 'car'"):
        load_set(semantic_set(), id2label=NAMES, ignore_index=1)
    with pytest.raises(
        ValueError, match=r"task 'panoptic' is not possible with the columns of .* \(objects\), allowed"
    ):
        load_set(object_set(), "panoptic")
