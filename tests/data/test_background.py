"""The background of formats that know objects only, for the semantic task."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from hf_maskformer.data.background import with_background
from hf_maskformer.data.load import load
from hf_maskformer.evaluation import MeanIoU
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import encode_rle

WHOLE = np.ones((8, 8), dtype=bool)
CORNER = np.zeros((8, 8), dtype=bool)
CORNER[:2, :2] = True


def write_objects(folder: Path, masks: list[np.ndarray], names: tuple[str, ...] = ("nucleus",)) -> Path:
    """One image for each mask, which is of the first class; one image more without an object."""
    (folder / "images").mkdir(parents=True)
    for number in range(len(masks) + 1):
        Image.new("RGB", (8, 8)).save(folder / "images" / f"{number}.png")
    images = [{"id": n, "file_name": f"{n}.png", "height": 8, "width": 8} for n in range(len(masks) + 1)]
    annotations = [
        {"id": n + 1, "image_id": n, "category_id": 1, "segmentation": encode_rle(mask), "area": int(mask.sum())}
        for n, mask in enumerate(masks)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder


def test_calling_everything_an_object_is_not_right(tmp_path, cache_dir):
    data = load(write_objects(tmp_path / "a", [CORNER]), split=None, task="semantic", cache_dir=cache_dir)
    metric = MeanIoU(data.label_spec.num_labels, ignore_index=data.label_spec.ignore_index)
    metric.update([np.zeros((8, 8), dtype=np.int64)], [data.reference(0)])
    assert metric.compute()["mean_iou"] == (4 / 64 + 0) / 2


def test_images_without_objects_and_without_background(tmp_path, cache_dir):
    data = load(write_objects(tmp_path / "a", [WHOLE]), split=None, task="semantic", cache_dir=cache_dir)
    assert [data.sample(index).class_labels.tolist() for index in (0, 1)] == [[0], [1]]
    assert data.sample(1).masks.all()
    assert (data.reference(1) == 1).all()


def test_a_class_of_this_name_is_taken(tmp_path, cache_dir):
    folder = write_objects(tmp_path / "a", [CORNER], ("nucleus", "Background"))
    data = load(folder, split=None, task="semantic", cache_dir=cache_dir)
    assert data.label_spec.id2label == {0: "nucleus", 1: "Background"}
    np.testing.assert_array_equal(data.reference(0), np.where(CORNER, 0, 1))


def test_the_other_tasks_have_no_background(tmp_path, cache_dir):
    data = load(write_objects(tmp_path / "a", [CORNER]), split=None, cache_dir=cache_dir)
    assert (data.task, data.label_spec.id2label) == ("instance", {0: "nucleus"})
    assert data.sample(1).class_labels.tolist() == []


def test_a_void_value_is_no_label():
    spec, label = with_background(LabelSpec({0: "a", 1: "b"}, thing_label_ids=(0,), ignore_index=2))
    assert (label, spec.ignore_index, spec.thing_label_ids) == (2, 3, (0,))
    assert spec.id2label == {0: "a", 1: "b", 2: "background"}


def test_an_area_below_zero_is_replaced(tmp_path, cache_dir, caplog):
    folder = write_objects(tmp_path / "a", [CORNER])
    content = json.loads((folder / "instances.json").read_text())
    content["annotations"][0]["area"] = -1
    (folder / "instances.json").write_text(json.dumps(content))
    data = load(folder, split=None, cache_dir=cache_dir)
    assert data.reference(0)["area"].tolist() == [4]
    assert "has area -1, which is no area; its 4 pixels are taken" in caplog.text
