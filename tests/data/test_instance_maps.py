"""Maps of object ids: ways to store ids, and every shape of a folder."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.id_map_files import IMAGE, MAP, as_cellpose, check_masks, masks_of, write_tiff
from hf_maskformer.data.inspection import inspect_dataset
from hf_maskformer.data.instance_maps import has_named_maps
from hf_maskformer.data.layouts import find_layouts, list_splits
from hf_maskformer.data.load import load

# --- what is read ----------------------------------------------------------------------------------------------------


def test_every_id_is_a_segment(id_map_folder: Path, id_map: np.ndarray, cache_dir: str) -> None:
    assert list_splits(id_map_folder) == ["train", "val"]
    data = load(id_map_folder, cache_dir=cache_dir)
    assert (data.format, data.task, len(data)) == ("instance_maps", "instance", 2)
    assert (data.label_spec.id2label, data.label_spec.thing_label_ids) == ({0: "object"}, (0,))
    first, second = data.row(0), data.row(1)
    assert (first["image_id"], first["file_name"], first["height"], first["width"]) == ("a", IMAGE, 6, 8)
    assert [(s["id"], s["label_id"], s["iscrowd"], s["area"], s["bbox"]) for s in first["segments"]] == [
        (3, 0, False, 7, [0, 0, 8, 6]),  # two pieces are one object
        (7, 0, False, 9, [1, 2, 3, 3]),
    ]
    check_masks(first, id_map)
    assert [(s["id"], s["area"], s["bbox"]) for s in second["segments"]] == [(255, 8, [2, 1, 4, 2])]


def test_the_background_of_the_semantic_task(id_map_folder: Path, id_map: np.ndarray, cache_dir: str) -> None:
    data = load(id_map_folder, task="semantic", class_name="cell", cache_dir=cache_dir)
    assert data.label_spec.id2label == {0: "cell", 1: "background"}
    assert data.label_spec.thing_label_ids == (0,)
    np.testing.assert_array_equal(data.reference(0), np.where(id_map, 0, 1))
    sample = data.sample(0)
    assert sample.class_labels.tolist() == [0, 1]
    np.testing.assert_array_equal(sample.masks, [id_map != 0, id_map == 0])
    with pytest.raises(ValueError, match="task 'panoptic' is not possible with format instance_maps"):
        load(id_map_folder, task="panoptic", cache_dir=cache_dir)


def test_an_image_without_objects(id_map_folder: Path, cache_dir: str) -> None:
    Image.new("L", (8, 6)).save(id_map_folder / MAP)
    data = load(id_map_folder, cache_dir=cache_dir)
    assert [len(data.row(index)["segments"]) for index in (0, 1)] == [0, 1]
    assert data.sample(0).masks.shape == (0, 6, 8)
    semantic = load(id_map_folder, task="semantic", cache_dir=cache_dir)
    np.testing.assert_array_equal(semantic.reference(0), np.ones((6, 8)))


def palette(ids: np.ndarray) -> Image.Image:
    image = Image.fromarray(ids)
    image.putpalette([0, 0, 0, 255, 255, 255, 128, 0, 0, 9, 9, 9, 1, 1, 1, 2, 2, 2, 3, 3, 3, 255, 255, 255])
    return image


def bigger(ids: np.ndarray, factor: int, dtype: type = np.int64) -> np.ndarray:
    """The ids 3 and 7 times a factor."""
    return (ids.astype(np.int64) * factor).astype(dtype)


# What a file holds of the ids, how it is written, and by how much its ids are larger.
WAYS: dict[str, tuple[str, Callable[[np.ndarray, Path], object], int]] = {
    "8 bits": (".png", lambda ids, file: Image.fromarray(ids).save(file), 1),
    "8 bits, BMP": (".bmp", lambda ids, file: Image.fromarray(ids).save(file), 1),
    "palette": (".png", lambda ids, file: palette(ids).save(file), 1),
    "16 bits": (".png", lambda ids, file: Image.fromarray(bigger(ids, 9000, np.uint16)).save(file), 9000),
    "16 bits, TIFF": (".tif", lambda ids, file: Image.fromarray(bigger(ids, 9000, np.uint16)).save(file), 9000),
    "16 bits, upper case": (".TIFF", lambda ids, file: Image.fromarray(bigger(ids, 9000, np.uint16)).save(file), 9000),
    "16 bits, signed": (".tif", lambda ids, file: write_tiff(file, bigger(ids, 4000, np.int16)), 4000),
    "16 bits, LZW": (
        ".tif",
        lambda ids, file: Image.fromarray(bigger(ids, 9000, np.uint16)).save(file, compression="tiff_lzw"),
        9000,
    ),
    "32 bits, PIL": (".tif", lambda ids, file: Image.fromarray(bigger(ids, 10**8, np.int32)).save(file), 10**8),
    "32 bits, signed": (".tif", lambda ids, file: write_tiff(file, bigger(ids, 3 * 10**8, np.int32)), 3 * 10**8),
    "32 bits, unsigned": (".tif", lambda ids, file: write_tiff(file, bigger(ids, 3 * 10**8, np.uint32)), 3 * 10**8),
    "whole floats": (".tif", lambda ids, file: Image.fromarray(ids.astype(np.float32)).save(file), 1),
}


@pytest.mark.parametrize("name", list(WAYS))
def test_ways_to_store_ids(name: str, id_map_folder: Path, id_map: np.ndarray, cache_dir: str) -> None:
    suffix, write, factor = WAYS[name]
    (id_map_folder / MAP).unlink()
    write(id_map, (id_map_folder / MAP).with_suffix(suffix))
    data = load(id_map_folder, cache_dir=cache_dir)
    check_masks(data.row(0), bigger(id_map, factor))
    semantic = load(id_map_folder, task="semantic", cache_dir=cache_dir)
    np.testing.assert_array_equal(semantic.reference(0), np.where(id_map, 0, 1))


def test_maps_of_one_bit_and_of_four(id_map_folder: Path, id_map: np.ndarray, read_rows: Callable) -> None:
    Image.fromarray(id_map == 7).save(id_map_folder / MAP)
    rows, _ = read_rows(id_map_folder, "raise")
    check_masks(rows[0], (id_map == 7).astype(np.uint8))
    palette(id_map).save(id_map_folder / MAP, bits=4)
    rows, _ = read_rows(id_map_folder, "raise")
    check_masks(rows[0], id_map)


def test_hundreds_of_objects(tmp_path: Path, read_rows: Callable) -> None:
    """Each object is exactly its pixels, also where ids are large, touch and leave gaps."""
    ids = np.random.default_rng(0).permutation(3000)[:900].reshape(30, 30).repeat(4, axis=0).repeat(5, axis=1)
    for part in ("images", "instance_maps"):
        (tmp_path / "train" / part).mkdir(parents=True)
    Image.new("RGB", (150, 120)).save(tmp_path / IMAGE)
    Image.fromarray(ids.astype(np.uint16)).save(tmp_path / MAP)
    rows, problems = read_rows(tmp_path, "raise")
    assert (len(rows[0]["segments"]), problems.found) == (len(set(ids.ravel().tolist()) - {0}), [])
    check_masks(rows[0], ids)


# --- shapes ----------------------------------------------------------------------------------------------------------


def nest(root: Path, part: str = "instance_maps") -> None:
    """SPLIT/images and SPLIT/instance_maps become images/SPLIT and PART/SPLIT."""
    for old, new in (("images", "images"), ("instance_maps", part)):
        (root / new).mkdir()
        for split in ("train", "val"):
            (root / split / old).rename(root / new / split)
    for split in ("train", "val"):
        (root / split).rmdir()


def test_a_nested_folder(id_map_folder: Path, id_map: np.ndarray, cache_dir: str) -> None:
    nest(id_map_folder)
    assert list_splits(id_map_folder) == ["train", "val"]
    data = load(id_map_folder, split="val", cache_dir=cache_dir)
    assert (data.format, len(data), data.row(0)["file_name"]) == ("instance_maps", 1, "images/val/c.png")
    check_masks(data.row(0), id_map)


def test_a_folder_that_is_one_split(id_map_folder: Path, id_map: np.ndarray, cache_dir: str) -> None:
    data = load(id_map_folder / "train", split=None, cache_dir=cache_dir)
    assert (data.format, data.split, len(data)) == ("instance_maps", None, 2)
    check_masks(data.row(0), id_map)


@pytest.mark.parametrize("part", ["labels", "masks"])
@pytest.mark.parametrize("nested", [False, True])
def test_other_names_of_the_folder_need_the_format(
    part: str, nested: bool, id_map_folder: Path, id_map: np.ndarray, cache_dir: str
) -> None:
    if nested:
        nest(id_map_folder, part)
    else:
        for split in ("train", "val"):
            (id_map_folder / split / "instance_maps").rename(id_map_folder / split / part)
    if part == "labels":
        assert [layout.format for layout in find_layouts(id_map_folder, "train")] == ["semantic_maps"]
    else:
        hint = "masks/train" if nested else "train/masks"
        with pytest.raises(
            ValueError, match=rf"if the maps in \S*{hint} hold ids of objects, pass format='instance_maps' \(--format"
        ):
            find_layouts(id_map_folder, "train")
    data = load(id_map_folder, format="instance_maps", cache_dir=cache_dir)
    assert (data.format, data.task, len(data)) == ("instance_maps", "instance", 2)
    check_masks(data.row(0), id_map)
    assert len(load(id_map_folder, "val", format="instance_maps", cache_dir=cache_dir)) == 1
    report = inspect_dataset(id_map_folder, format="instance_maps")
    assert [(split.split, split.images, split.classes[0].segments) for split in report.splits] == [
        ("train", 2, 3),
        ("val", 1, 2),
    ]
    if not nested:
        alone = load(id_map_folder / "train", split=None, format="instance_maps", cache_dir=cache_dir)
        assert len(alone) == 2


def test_the_named_folder_comes_before_others(id_map_folder: Path, cache_dir: str) -> None:
    for part in ("labels", "masks"):
        shutil.copytree(id_map_folder / "train" / "images", id_map_folder / "train" / part)
    data = load(id_map_folder, format="instance_maps", cache_dir=cache_dir)
    assert [len(data.row(index)["segments"]) for index in (0, 1)] == [2, 1]
    assert [layout.format for layout in find_layouts(id_map_folder, "train")] == ["instance_maps", "semantic_maps"]


def test_labels_and_masks_are_not_guessed(id_map_folder: Path) -> None:
    split = id_map_folder / "train"
    (split / "instance_maps").rename(split / "masks")
    shutil.copytree(split / "masks", split / "labels")
    with pytest.raises(ValueError, match=r"train/labels and \S*train/masks both hold maps: name the folder of"):
        find_layouts(id_map_folder, "train", format="instance_maps")
    for file in (split / "labels").iterdir():  # texts of YOLO are no maps
        file.rename(file.with_suffix(".txt"))
    (layout,) = find_layouts(id_map_folder, "train", format="instance_maps")
    assert layout.maps == split / "masks"


def test_folders_of_masks_are_no_maps(object_folder: Path) -> None:
    with pytest.raises(ValueError, match="does not have the shape of format instance_maps: it holds a/, b/"):
        find_layouts(object_folder, "train", format="instance_maps")


@pytest.mark.parametrize(
    ("image_ending", "map_ending"), [("_img", "_masks"), ("", "_masks"), ("", "_cp_masks"), ("_img", "_img_cp_masks")]
)
def test_images_and_maps_in_one_folder(
    image_ending: str, map_ending: str, id_map_folder: Path, id_map: np.ndarray, cache_dir: str
) -> None:
    as_cellpose(id_map_folder, image_ending, map_ending)
    assert list_splits(id_map_folder) == ["train", "val"]
    data = load(id_map_folder, cache_dir=cache_dir)
    assert (data.format, len(data), data.label_spec.id2label) == ("instance_maps", 2, {0: "object"})
    names = [(data.row(index)["image_id"], data.row(index)["file_name"]) for index in (0, 1)]
    assert names == [(f"{name}{image_ending}", f"train/{name}{image_ending}.png") for name in "ab"]
    check_masks(data.row(0), id_map)
    alone = load(id_map_folder / "train", split=None, class_name="cell", cache_dir=cache_dir)
    assert (len(alone), alone.label_spec.id2label) == (2, {0: "cell"})
    with pytest.raises(ValueError, match="its images lie at the top, so pass split=None"):
        load(id_map_folder / "train", cache_dir=cache_dir)


BY_PRODUCTS = ("a_flows.tif", "a_img_cp_output.png", "a_outlines_cp_masks.txt", "a_seg.npy", "b_dP.tif", "notes.txt")


def test_by_products_are_not_used(id_map_folder: Path, read_rows: Callable) -> None:
    split = as_cellpose(id_map_folder) / "train"
    for name in BY_PRODUCTS:
        shutil.copy(split / "a_img.png", split / name)
    (split / "models").mkdir()
    (split / "models" / "cyto").touch()
    rows, problems = read_rows(id_map_folder, "raise")
    assert [row["image_id"] for row in rows] == ["a_img", "b_img"]
    assert [(problem.kind, Path(problem.file).name) for problem in problems.found] == [
        *(("unlisted_file", name) for name in BY_PRODUCTS),
        ("unlisted_file", "models"),
    ]
    assert all("not used" in problem.message for problem in problems.found)


def test_an_image_may_be_called_as_a_by_product(id_map_folder: Path, read_rows: Callable) -> None:
    split = as_cellpose(id_map_folder) / "train"
    (split / "a_img.png").rename(split / "a_flows.png")
    (split / "a_masks.png").rename(split / "a_flows_masks.png")
    rows, problems = read_rows(id_map_folder, "raise")
    assert ([row["image_id"] for row in rows], problems.found) == (["a_flows", "b_img"], [])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a_img.png", "a_masks.png"], True),
        (["a.jpg", "a_cp_masks.TIF"], True),
        (["a.png", "b_masks.png"], False),
        (["a_masks.png", "a_cp_masks.png"], False),
        (["a.png", "a_masks.npy"], False),
        (["a.png", "a_mask.png"], False),
        ([], False),
    ],
)
def test_names_of_maps(names: list[str], expected: bool) -> None:
    assert has_named_maps(names) is expected


# --- real images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_folder", [False, True])
def test_real_nuclei_keep_every_mask(one_folder: bool, shared_data: Path, tmp_path: Path, read_rows: Callable) -> None:
    """The nuclei of five real images without overlap, written as maps of ids, come back as the same codes."""
    rows, _ = read_rows(shared_data / "nuclei", "raise", split="val", format="coco_instance")
    chosen = [row for row in rows if _apart(row)][:5]
    assert len(chosen) == 5
    split = tmp_path / "set" / "val"
    images, maps = (split, split) if one_folder else (split / "images", split / "instance_maps")
    for folder in (images, maps):
        folder.mkdir(parents=True, exist_ok=True)
    for row in chosen:
        ids = np.zeros((row["height"], row["width"]), dtype=np.uint16)
        for segment, mask in zip(row["segments"], masks_of(row).values(), strict=True):
            ids[mask] = segment["id"]
        shutil.copy(row["image"]["path"], images / f"{row['image_id']}{'_img' * one_folder}.png")
        Image.fromarray(ids).save(maps / f"{row['image_id']}{'_masks' * one_folder}.tif")
    again, problems = read_rows(tmp_path / "set", "raise", split="val")
    assert problems.found == []
    expected = {
        row["image_id"]: {segment["id"]: (segment["rle"], segment["area"]) for segment in row["segments"]}
        for row in chosen
    }
    assert {
        row["image_id"].removesuffix("_img"): {s["id"]: (s["rle"], s["area"]) for s in row["segments"]}
        for row in again
    } == expected
    assert sum(map(len, expected.values())) > 50


def _apart(row: dict) -> bool:
    """Whether an image has objects, none of which overlap, with ids that fit 16 bits."""
    masks = masks_of(row)
    return len(masks) > 1 and max(masks) < 2**16 and np.sum(list(masks.values()), axis=0).max() == 1
