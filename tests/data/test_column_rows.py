"""Rows from columns: every kind of truth by hand-made values, and what is wrong with a record."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from data.hub_sets import (
    CLASSES,
    HEIGHT,
    MASKS,
    NAMES,
    OBJECT,
    WIDTH,
    cell,
    fields_of,
    masks_of,
    objects,
    one_row,
    photo,
    semantic_map,
    semantic_set,
)
from hf_maskformer.data.hub import hub_source, load_hub
from hf_maskformer.data.problems import Problems
from hf_maskformer.model.masks import encode_rle, ids_to_panoptic_png


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


SEGMENT = {"id": Value("int64"), "category_id": Value("int64"), "iscrowd": Value("int64"), "isthing": Value("int64")}
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


# --- bad records ----------------------------------------------------------------------------------------------------


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


TEXT_OBJECT = {"category": Value("int64"), "rle": Value("string"), "id": Value("string"), "area": Value("string")}
BAD_FIELDS = {
    "id ab-c": ({"id": "ab-c"}, "broken_record", "object 0 of the list has id 'ab-c', it must be a whole number"),
    "area x": ({"area": "x"}, "broken_record", "object 7 has area 'x', which is no area; its 16 pixels are taken"),
    "crowd 2": ({"iscrowd": 2.0}, "broken_record", "object 7 has iscrowd 2.0, it must be 0 or 1"),
    "no class": ({"category": None}, "unknown_label", "object 7: class None is not known, allowed: 0, 1"),
}


@pytest.mark.parametrize("name", list(BAD_FIELDS))
def test_fields_of_objects_that_cannot_be_used_are_named(tmp_path, name):
    change, kind, message = BAD_FIELDS[name]
    record = {"category": 1, "rle": encode_rle(MASKS[0])["counts"], "id": "7", "area": None, "iscrowd": None}
    features = List({**TEXT_OBJECT, "iscrowd": Value("float64")})
    one_row({"objects": features}, objects=[{**record, **change}, record]).save_to_disk(str(tmp_path / "set"))
    problems = Problems("list")
    (row,) = hub_source(tmp_path / "set", None, {"id2label": NAMES}, problems).rows()
    assert fields_of(row, "id", "iscrowd", "area")[-1] == (7, False, 16.0)
    assert [problem.kind for problem in problems.found if problem.kind != "duplicate"] == [kind]
    assert problems.found[0].message.endswith(f"set train row 0 (objects): {message}")


def test_an_area_that_is_nan_is_the_masks(load_set):
    row = load_set(one_row({"objects": List(OBJECT)}, objects=[{**objects()[0], "area": float("nan")}])).row(0)
    assert fields_of(row, "area") == [(16.0,)]


def test_segments_without_an_id_and_records_that_are_none_are_named(load_set):
    info = [*PANOPTIC_INFO[:2], {**PANOPTIC_INFO[2], "id": None}]
    with pytest.raises(ValueError, match=r"row 0 \(segments_info\): segment 2 of the list has id None"):
        load_set(panoptic_set(info), id2label=NAMES)
    with pytest.raises(ValueError, match=r"row 0 \(objects\): record 1 of the list is None"):
        load_set(one_row({"objects": List(OBJECT)}, objects=[objects()[0], None]))


def test_a_row_with_an_unreadable_mask_is_skipped_whole(load_set, tmp_path):
    features = Features({"image": Image(), "masks": List(Image()), "labels": List(CLASSES)})
    cells = [cell(mask.astype(np.uint8)) for mask in MASKS[:2]]
    broken = [cells[0], {"bytes": cells[1]["bytes"][:40], "path": None}]
    rows = [{"image": photo(number), "masks": masks, "labels": [0, 1]} for number, masks in enumerate((broken, cells))]
    data = Dataset.from_list(rows, features=features)
    found = load_set(data, on_bad_sample="skip")
    assert [row["file_name"] for row in found.rows()] == ["1.png"]
    assert [problem.kind for problem in found.left_out] == ["unreadable_file"]
    assert "row 0 (masks) mask 2" in found.left_out[0].message
    data.save_to_disk(str(tmp_path / "listed"))
    listed = list(hub_source(tmp_path / "listed", None, {}, Problems("list")).rows())
    assert [len(row["segments"]) for row in listed] == [1, 2]
