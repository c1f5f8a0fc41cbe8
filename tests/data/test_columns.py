"""Which column holds what: mappings that are given, guessed, and refused."""

import logging

import pytest
from datasets import ClassLabel, Features, Image, List, Value

from hf_maskformer.data.columns import class_names, describe, resolve_columns

RECORD = {"id": Value("int64"), "category_id": Value("int64"), "iscrowd": Value("int64")}
COCO = {"category": ClassLabel(names=["a", "b"]), "segmentation": List(List(Value("float32")))}


@pytest.mark.parametrize(
    ("features", "kind", "roles"),
    [
        ({"image": Image(), "label": Image()}, "semantic", {"image": "image", "semantic_map": "label"}),
        ({"img": Image(), "Annotation": Image()}, "semantic", {"image": "img", "semantic_map": "Annotation"}),
        ({"pixel_values": Image(), "mask": Image()}, "semantic", {"image": "pixel_values", "semantic_map": "mask"}),
        ({"jpg": Image(), "seg.png": Image()}, "semantic", {"image": "jpg", "semantic_map": "seg.png"}),
        ({"photo": Image(), "label": Image()}, "semantic", {"image": "photo", "semantic_map": "label"}),
        (
            {"image": Image(), "label": Image(), "image_id": Value("int64"), "file_name": Value("string")},
            "semantic",
            {"image": "image", "semantic_map": "label", "image_id": "image_id", "file_name": "file_name"},
        ),
        (
            {"image": Image(), "label": Image(), "segments_info": List(RECORD)},
            "panoptic",
            {"image": "image", "panoptic_map": "label", "segments_info": "segments_info"},
        ),
        (
            {"image": Image(), "panoptic": Image(), "label": Image(), "segments_info": List(RECORD)},
            "panoptic",
            {"image": "image", "panoptic_map": "panoptic", "segments_info": "segments_info"},
        ),
        (
            {"image": Image(), "instance": Image(), "semantic": Image()},
            "instance_map",
            {"image": "image", "instance_map": "instance", "semantic_map": "semantic"},
        ),
        ({"image": Image(), "objects": List(COCO)}, "objects", {"image": "image", "objects": "objects"}),
        (
            {"image": Image(), "annotations": {name: List(field) for name, field in COCO.items()}},
            "objects",
            {"image": "image", "objects": "annotations"},
        ),
        (
            {"image": Image(), "masks": List(Image()), "labels": List(Value("string"))},
            "masks",
            {"image": "image", "masks": "masks", "labels": "labels"},
        ),
        # Files without the metadata of `datasets`.
        (
            {"image": {"bytes": Value("binary"), "path": Value("string")}, "mask": Value("binary")},
            "semantic",
            {"image": "image", "semantic_map": "mask"},
        ),
        # A class number is no map, whatever its name.
        (
            {"image": Image(), "label": Value("int64"), "annotation": Image()},
            "semantic",
            {"image": "image", "semantic_map": "annotation"},
        ),
    ],
)
def test_names_and_types_are_guessed_and_logged(features, kind, roles, caplog):
    with caplog.at_level(logging.INFO, logger="hf_maskformer"):
        columns = resolve_columns(Features(features), None, "owner/name train")
    assert columns.kind == kind
    assert columns.roles == roles
    for role, column in roles.items():
        assert f"{role} = {column!r}" in caplog.text
    assert "owner/name train: columns are guessed" in caplog.text


def test_a_mapping_is_taken_and_only_the_rest_is_guessed(caplog):
    features = Features({"photo": Image(), "depth": Image(), "truth": Image(), "label": Image()})
    with caplog.at_level(logging.INFO, logger="hf_maskformer"):
        columns = resolve_columns(features, {"image": "photo", "semantic_map": "truth"}, "set")
    assert columns.roles == {"image": "photo", "semantic_map": "truth"}
    assert caplog.text == ""
    features = Features({"image": Image(), "instance": Image(), "label": Image()})
    assert resolve_columns(features, {"semantic_map": "label"}, "set").kind == "semantic"
    assert resolve_columns(features, {"instance_map": "instance"}, "set").roles["semantic_map"] == "label"


@pytest.mark.parametrize(
    ("features", "given", "message"),
    [
        ({"image": Image(), "label": Image(), "mask": Image()}, None, "'label', 'mask' could each be semantic_map"),
        ({"image": Image(), "label": Image(), "objects": List(COCO)}, None, "several columns could be the truth"),
        (
            {"image": Image(), "instance": Image(), "label": Image(), "mask": Image()},
            None,
            "'label', 'mask' could each be semantic_map",
        ),
        ({"a": Image(), "b": Image(), "label": Image()}, None, "'a', 'b' could each be image"),
        ({"image": Image(), "depth": Image()}, None, "no column is known by its name and type to hold masks"),
        ({"label": Image()}, None, "no column is left that could be the image"),
        ({"image": Image(), "label": Image()}, {"truth": "label"}, "'truth' is no role"),
        ({"image": Image(), "label": Image()}, {"semantic_map": "lable"}, "there is no column 'lable'"),
        (
            {"image": Image(), "label": Image()},
            {"semantic_map": ["label"]},
            "the column given as semantic_map is ['label'], it must be a name",
        ),
        (
            {"image": Image(), "label": Value("int64")},
            {"semantic_map": "label"},
            "column 'label' cannot be semantic_map: it must be an Image of label ids, but is int64",
        ),
        (
            {"image": Image(), "p": Image()},
            {"panoptic_map": "p"},
            "the columns given do not suffice: panoptic also needs segments_info",
        ),
        (
            {"image": Image(), "label": Image(), "objects": List(COCO)},
            {"semantic_map": "label", "objects": "objects"},
            "the roles objects, semantic_map do not go together",
        ),
        ({"image": Image(), "label": Image()}, "label", "it must map roles to column names"),
    ],
)
def test_what_is_ambiguous_incomplete_or_wrong_lists_the_columns(features, given, message):
    with pytest.raises(ValueError, match=r"^owner/name train: ") as caught:
        resolve_columns(Features(features), given, "owner/name train")
    text = str(caught.value)
    assert message in text
    for name, feature in features.items():
        assert f"  {name}: {describe(feature)}" in text
    assert "columns={'image': " in text
    assert "--dataset-options 'columns={image: " in text


def test_class_names_come_from_class_labels_wherever_they_are_nested():
    for feature in (List(COCO), {name: List(field) for name, field in COCO.items()}):
        features = Features({"image": Image(), "objects": feature})
        assert class_names(features, resolve_columns(features, None, "set")) == {0: "a", 1: "b"}
    features = Features({"image": Image(), "masks": List(Image()), "labels": List(ClassLabel(names=["x"]))})
    assert class_names(features, resolve_columns(features, None, "set")) == {0: "x"}
    features = Features({"image": Image(), "label": Image()})
    assert class_names(features, resolve_columns(features, None, "set")) is None


def test_types_are_described_in_words():
    assert describe(List(COCO)) == (
        "list of struct of category: ClassLabel with 2 names, segmentation: list of list of float32"
    )
    assert describe(Image()) == "Image"
