"""Breaks copies of COCO instance and COCO panoptic sets; see `dataset_breaker`."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.dataset_breaker import BROKEN_TEXT, VAL_FILES, Planted, change_png, cut
from hf_maskformer.model.masks import encode_rle, ids_to_panoptic_png, panoptic_png_to_ids

# Images whose annotation is damaged, from the first on in instances.json and from the last on in panoptic.json.
BROKEN_INSTANCE_IMAGES, BROKEN_PANOPTIC_IMAGES = 17, 15
MAX_OBJECTS = 30  # of a nuclei image that is copied
FORMATS = ("instances", "panoptic")


# --- copies


def copy_nuclei(source: Path, target: Path, count: int = 36) -> Path:
    """A few images of each split with few objects, in the instance and the panoptic form."""
    for split, number in (("train", count), ("val", VAL_FILES)):
        instances, panoptic = (json.loads((source / split / f"{name}.json").read_text()) for name in FORMATS)
        few = {
            entry["image_id"] for entry in panoptic["annotations"] if 4 <= len(entry["segments_info"]) <= MAX_OBJECTS
        }
        records = [record for record in panoptic["images"] if record["id"] in few][:number]
        kept = {record["id"] for record in records}
        for part in ("images", "panoptic"):
            (target / split / part).mkdir(parents=True)
        for record in records:
            shutil.copyfile(
                source / split / "images" / record["file_name"], target / split / "images" / record["file_name"]
            )
        for name, content in zip(FORMATS, (instances, panoptic), strict=True):
            content["images"] = records
            content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in kept]
            (target / split / f"{name}.json").write_text(json.dumps(content))
        for entry in panoptic["annotations"]:
            shutil.copyfile(
                source / split / "panoptic" / entry["file_name"], target / split / "panoptic" / entry["file_name"]
            )
    return target


def copy_coco_sample(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, copy_function=shutil.copyfile))


# --- COCO instance ---------------------------------------------------------------------------------------------------


class InstanceBreaker:
    """Damage of an instances.json; hands out the images of its list one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "instances.json"
        self.content = json.loads(self.path.read_text())
        self.records, self.annotations = self.content["images"], self.content["annotations"]
        self.planted: list[Planted] = []
        self._records = iter(list(self.records))

    def plant(self, kind: str, *words: object, file: str = "instances.json") -> None:
        self.planted.append(Planted(kind, f"{self.folder.name}/{file}", tuple(map(str, words))))

    def take_image(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The next image and its annotations."""
        record = next(self._records)
        return record, [entry for entry in self.annotations if entry["image_id"] == record["id"]]

    def take(self) -> dict[str, Any]:
        """The first annotation of the next image."""
        return self.take_image()[1][0]

    def add(self, entry: dict[str, Any], **changes: object) -> None:
        """One more annotation, like `entry` except for the changes."""
        self.annotations.append({**copy.deepcopy(entry), **changes})

    def save(self) -> list[Planted]:
        self.path.write_text(json.dumps(self.content))
        return self.planted


def break_instances(folder: Path) -> list[Planted]:
    """Damage of instances.json (not of the images) in 18 ways, each in an image of its own."""
    breaker = InstanceBreaker(folder)
    _break_masks(breaker)
    _break_ids_and_boxes(breaker)
    _break_records(breaker)
    extra = folder / "images" / "extra_image.png"
    Image.fromarray(np.full((20, 30, 3), 77, dtype=np.uint8)).save(extra)
    breaker.plant("unlisted_file", file=f"images/{extra.name}")
    return breaker.save()


def _break_masks(breaker: InstanceBreaker) -> None:
    entry = breaker.take()
    entry["segmentation"] = [[1.0, 1.0, 5.0, 5.0]]
    breaker.plant("broken_mask", f"annotation {entry['id']} ", "3 points")
    entry = breaker.take()
    height, width = entry["segmentation"]["size"]
    entry["segmentation"] = encode_rle(np.ones((height + 1, width), dtype=bool))
    breaker.plant("size_mismatch", f"annotation {entry['id']} ", height + 1)
    entry = breaker.take()
    entry["segmentation"] = {"size": entry["segmentation"]["size"], "counts": [5, 3]}
    breaker.plant("broken_mask", f"annotation {entry['id']} ", "8 pixels")
    entry = breaker.take()
    entry["segmentation"] = {"size": entry["segmentation"]["size"], "counts": "~~~"}
    breaker.plant("broken_mask", f"annotation {entry['id']} ")


def _break_ids_and_boxes(breaker: InstanceBreaker) -> None:
    entry = breaker.take()
    entry["category_id"] = 4711
    breaker.plant("unknown_label", f"annotation {entry['id']} ", "4711")
    breaker.add(breaker.take(), id=900001, image_id=987654)
    breaker.plant("broken_record", "annotation 900001 ", "987654")
    entry = breaker.take()
    entry["bbox"] = [entry["bbox"][0] + 9, *entry["bbox"][1:]]
    breaker.plant("box_mismatch", f"annotation {entry['id']} ")
    first, second = breaker.take_image()[1][:2]
    second["id"] = first["id"]
    breaker.plant("duplicate", f"id {first['id']} ")
    entry = breaker.take()
    breaker.add(entry, id=900002)
    breaker.plant("duplicate", 900002, entry["id"])


def _break_records(breaker: InstanceBreaker) -> None:
    entry = breaker.take()
    entry["segmentation"] = encode_rle(np.zeros(entry["segmentation"]["size"], dtype=bool))
    breaker.plant("empty_mask", f"annotation {entry['id']} ")
    record, _ = breaker.take_image()
    record["height"] += 3
    breaker.plant("size_mismatch", file=f"images/{record['file_name']}")
    breaker.records.append({**record, "id": 800001, "file_name": "never_made.jpg"})
    breaker.plant("missing_file", "never_made.jpg")
    entry = breaker.take()
    del entry["segmentation"]
    breaker.plant("broken_mask", f"annotation {entry['id']} ")
    entry = breaker.take()
    del entry["category_id"]
    breaker.plant("unknown_label", f"annotation {entry['id']} ")
    record, _ = breaker.take_image()
    breaker.records.append(dict(record))
    breaker.plant("duplicate", f"image id {record['id']} ")
    entry = breaker.take()
    entry["segmentation"] = {"size": entry["segmentation"]["size"]}
    breaker.plant("broken_mask", f"annotation {entry['id']} ")
    breaker.content["categories"].append({"id": 71})
    breaker.plant("unknown_label", "class 71 ")


# --- COCO panoptic ---------------------------------------------------------------------------------------------------


class PanopticBreaker:
    """Damage of a panoptic JSON and its PNGs; each method plants one and notes it in `planted`."""

    def __init__(self, root: Path, annotations: Path, images: Path, maps: Path) -> None:
        self.root, self.path, self.images, self.maps = root, annotations, images, maps
        self.content = json.loads(annotations.read_text())
        self.planted: list[Planted] = []

    def save(self) -> list[Planted]:
        self.path.write_text(json.dumps(self.content))
        return self.planted

    def plant(self, kind: str, file: Path, *words: object) -> None:
        self.planted.append(Planted(kind, str(file.relative_to(self.root)), tuple(map(str, words))))

    def png(self, entry: dict[str, Any]) -> Path:
        return self.maps / entry["file_name"]

    def paint(self, entry: dict[str, Any], change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Changes the (H, W) segment ids of a PNG."""
        change_png(self.png(entry), lambda values: ids_to_panoptic_png(change(panoptic_png_to_ids(values[..., :3]))))

    def add_image(self, name: str) -> dict[str, Any]:
        """The first image with its annotation again under another id, mirrored so that it is no duplicate."""
        record, entry = self.content["images"][0], self.content["annotations"][0]
        number = 700000 + len(self.content["images"])
        new_record = {**record, "id": number, "file_name": f"{name}.png"}
        new_entry = {**copy.deepcopy(entry), "image_id": number, "file_name": f"{name}.png"}
        for source, target in (
            (self.images / record["file_name"], self.images / new_record["file_name"]),
            (self.png(entry), self.png(new_entry)),
        ):
            with Image.open(source) as image:
                values = np.array(image.convert("RGB"))[::-1].copy()
            if target.parent == self.images:
                values[0, 0] = number % 251  # two added images differ
            Image.fromarray(values).save(target)
        for info in new_entry["segments_info"]:
            info.pop("bbox")
        self.content["images"].append(new_record)
        self.content["annotations"].append(new_entry)
        return new_entry

    def unlisted_segment(self, entry: dict[str, Any]) -> None:
        gone = entry["segments_info"].pop()
        self.plant("unlisted_segment", self.png(entry), gone["id"])

    def absent_segment(self, entry: dict[str, Any]) -> None:
        entry["segments_info"].append({**entry["segments_info"][0], "id": 654321})
        self.plant("empty_mask", self.png(entry), 654321)

    def repeated_segment(self, entry: dict[str, Any]) -> None:
        entry["segments_info"].append(dict(entry["segments_info"][0]))
        self.plant("duplicate", self.png(entry), entry["segments_info"][0]["id"])

    def void_segment(self, entry: dict[str, Any]) -> None:
        entry["segments_info"].append({**entry["segments_info"][0], "id": 0})
        self.plant("broken_record", self.png(entry), "id 0")

    def unknown_category(self, entry: dict[str, Any]) -> None:
        entry["segments_info"][0]["category_id"] = 4711
        self.plant("unknown_label", self.png(entry), entry["segments_info"][0]["id"], 4711)

    def box(self, entry: dict[str, Any]) -> None:
        info = entry["segments_info"][-1]
        info["bbox"] = [info["bbox"][0], info["bbox"][1] + 9, *info["bbox"][2:]]
        self.plant("box_mismatch", self.png(entry), info["id"])

    def other_size(self, entry: dict[str, Any]) -> None:
        self.paint(entry, lambda ids: ids[:-3])
        self.plant("size_mismatch", self.png(entry))

    def zero_bytes(self, entry: dict[str, Any]) -> None:
        self.png(entry).write_bytes(b"")
        self.plant("unreadable_file", self.png(entry))

    def cut_off(self, entry: dict[str, Any]) -> None:
        cut(self.png(entry))
        self.plant("unreadable_file", self.png(entry))

    def grey(self, entry: dict[str, Any]) -> None:
        change_png(self.png(entry), lambda values: values[..., 0])
        self.plant("unreadable_file", self.png(entry), "mode L")

    def missing_png(self, entry: dict[str, Any]) -> None:
        self.png(entry).unlink()
        self.plant("missing_file", self.png(entry))

    def no_annotation(self, entry: dict[str, Any]) -> None:
        self.content["annotations"].remove(entry)
        record = next(record for record in self.content["images"] if record["id"] == entry["image_id"])
        self.plant("broken_record", self.path, record["file_name"])
        self.plant("unlisted_file", self.png(entry))

    def unknown_image(self, entry: dict[str, Any]) -> None:
        self.content["annotations"].append({**copy.deepcopy(entry), "image_id": 987654})
        self.plant("broken_record", self.path, 987654)

    def two_annotations(self, entry: dict[str, Any]) -> None:
        self.content["annotations"].append(copy.deepcopy(entry))
        self.plant("duplicate", self.path, entry["image_id"])

    def missing_image(self) -> None:
        record = {**self.content["images"][0], "id": 800001, "file_name": "never_made.jpg"}
        self.content["images"].append(record)
        self.content["annotations"].append({**copy.deepcopy(self.content["annotations"][0]), "image_id": 800001})
        self.plant("missing_file", self.path, "never_made.jpg")


def break_panoptic(root: Path, split: str = "train") -> list[Planted]:
    """Damage of panoptic.json and its PNGs (not of the images) in 16 ways, each in an image of its own."""
    folder = root / split
    breaker = PanopticBreaker(root, folder / "panoptic.json", folder / "images", folder / "panoptic")
    entries = iter(list(breaker.content["annotations"])[::-1])
    damages = (
        breaker.unlisted_segment,
        breaker.absent_segment,
        breaker.repeated_segment,
        breaker.void_segment,
        breaker.unknown_category,
        breaker.box,
        breaker.other_size,
        breaker.zero_bytes,
        breaker.cut_off,
        breaker.grey,
        breaker.missing_png,
        breaker.no_annotation,
        breaker.unknown_image,
        breaker.two_annotations,
    )
    for damage in damages:
        damage(next(entries))
    breaker.missing_image()
    return breaker.save()


def break_nuclei(root: Path) -> list[Planted]:
    """Images, instances.json and panoptic.json of the training split, all at once."""
    planted = break_panoptic(root)
    planted += break_instances(root / "train")
    planted.append(Planted("broken_record", "val/instances.json", ("71",)))  # a class that only train has now
    records = json.loads((root / "train" / "panoptic.json").read_text())["images"]
    files = [root / "train" / "images" / record["file_name"] for record in records]
    middle = files[BROKEN_INSTANCE_IMAGES:-BROKEN_PANOPTIC_IMAGES]
    middle[0].write_bytes(b"")
    cut(middle[1], keep=0.6)
    middle[2].write_bytes(BROKEN_TEXT)
    planted += [Planted("unreadable_file", str(file.relative_to(root))) for file in middle[:3]]
    leak = root / "val" / "images" / json.loads((root / "val" / "panoptic.json").read_text())["images"][0]["file_name"]
    return [*planted, plant_leak(root, leak)]


def plant_leak(root: Path, leak: Path) -> Planted:
    """Puts an image of train in the place of one of val; both have the same size."""
    with Image.open(leak) as image:
        size = image.size
    for file in sorted((root / "train" / "images").iterdir()):
        if file.stat().st_size and file.suffix == ".jpg" and Image.open(file).size == size:
            shutil.copyfile(file, leak)
            return Planted("duplicate", str(leak.relative_to(root)), (file.name, "train"))
    raise ValueError(f"no image of train has the size {size} of {leak}")


def break_coco_sample(root: Path) -> list[Planted]:
    """The standard COCO tree with two images: eight images are added, then everything is broken in 14 ways."""
    breaker = PanopticBreaker(root, root / "panoptic_examples.json", root / "input_images", root / "panoptic_examples")
    first, second = breaker.content["annotations"]
    added = [breaker.add_image(f"added_{number}") for number in range(8)]
    breaker.box(first)
    breaker.absent_segment(first)
    breaker.unknown_category(second)
    breaker.unlisted_segment(second)
    breaker.void_segment(second)
    breaker.other_size(added[0])
    breaker.zero_bytes(added[1])
    breaker.grey(added[2])
    breaker.missing_png(added[3])
    breaker.no_annotation(added[4])
    breaker.repeated_segment(added[5])
    breaker.two_annotations(added[5])
    breaker.unknown_image(added[5])
    breaker.missing_image()
    image = root / "input_images" / "added_6.png"
    cut(image)
    breaker.plant("unreadable_file", image)
    image = root / "input_images" / "added_7.png"
    image.write_bytes(BROKEN_TEXT)
    breaker.plant("unreadable_file", image)
    (root / "input_images" / "extra.jpg").write_bytes((root / "input_images" / "000000142238.jpg").read_bytes())
    breaker.plant("unlisted_file", root / "input_images" / "extra.jpg")
    breaker.plant("duplicate", root / "input_images" / "extra.jpg", "000000142238.jpg")
    return breaker.save()
