"""Label tables of every form, and label files read through them."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_maskformer.data.label_files import read_labels
from hf_maskformer.data.label_table import find_label_table, read_label_table
from hf_maskformer.data.load import load
from hf_maskformer.data.problems import DatasetError

ROAD, CAR, SKY, VOID = (128, 64, 128), (0, 0, 142), (70, 130, 180), (0, 0, 0)
COLOURS = np.array([ROAD, CAR, SKY, VOID], dtype=np.uint8)
INDICES = np.array([[0, 0, 1, 1], [2, 3, 3, 0]])
LABELS = np.array([[0, 0, 1, 1], [2, 255, 255, 0]])

TABLES = {
    "label_table.json": json.dumps({"#804080": "road", "0,0,142": "car", "[70, 130, 180]": "sky", "0, 0, 0": None}),
    "class_dict.csv": "name,r,g,b\nroad,128,64,128\ncar,0,0,142\n\nsky,70,130,180\nVoid,0,0,0\n",
    "labelmap.txt": "# label:color_rgb:parts:actions\nroad:128,64,128::\ncar:0,0,142::\nsky:70,130,180::\n"
    "ignore:0,0,0::\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_every_form_of_a_colour_table(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(TABLES[name])
    assert find_label_table(tmp_path) == tmp_path / name
    table = read_label_table(tmp_path / name)
    assert table.is_colour
    assert table.label_spec.id2label == {0: "road", 1: "car", 2: "sky"}
    assert table.label_spec.raw_to_label == {0x804080: 0, 142: 1, 0x4682B4: 2, 0: 255}


def test_numbers_with_gaps_and_names_that_stand_twice() -> None:
    table = read_label_table({7: "road", "11": "car", 8: "road", 26: "void", 0: None})
    assert not table.is_colour
    assert table.label_spec.id2label == {0: "road", 1: "car"}
    assert table.label_spec.raw_to_label == {7: 0, 11: 1, 8: 0, 26: 255, 0: 255}
    labels, known = table.labels_of(np.array([[7, 8, 11], [26, 255, 9]]))
    assert labels.tolist() == [[0, 0, 1], [255, 255, 255]]
    assert known.tolist() == [[True, True, True], [True, True, False]], "the ignore_index needs no entry"


def test_more_classes_than_an_8_bit_void_value_allows() -> None:
    table = read_label_table({str(value): f"class {value}" for value in range(300)})
    assert table.label_spec.ignore_index == 65535


def test_an_ignore_index_among_the_labels() -> None:
    table = read_label_table({"1": "a", "2": "b"}, ignore_index=0)
    assert table.label_spec.id2label == {0: "a", 1: "b"}
    assert table.labels_of(np.array([0, 1, 2]))[0].tolist() == [65535, 0, 1]
    assert table.labels_of(np.array([255]))[1].tolist() == [False]
    named = read_label_table({"0": "a", "1": "b"}, ignore_index=0)
    assert named.labels_of(np.array([0, 1]))[0].tolist() == [0, 1], "the table says what it means"
    black = read_label_table({"#ffffff": "a", "#ff0000": "b"}, ignore_index=0)
    assert black.labels_of(np.array([0]))[1].tolist() == [False], "a colour is no value"


@pytest.mark.parametrize("value", ["255", -1, True, 0.5, None])
def test_an_ignore_index_of_another_type(value: object) -> None:
    with pytest.raises(ValueError, match="ignore_index must be a whole number of at least 0, got"):
        read_label_table({"1": "a"}, value)  # type: ignore[arg-type]


@pytest.mark.parametrize("table", [5, ["a", "b"]])
def test_a_table_of_another_type(table: object) -> None:
    with pytest.raises(ValueError, match="label_table must be the path of a file or a table"):
        read_label_table(table)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text", "kind", "message"),
    [
        ("label_table.json", '{"7": " "}', "broken_record", "'7' has an empty name"),
        ("class_dict.csv", "name,r,g,b\n,1,2,3\n", "broken_record", "'1,2,3' has an empty name"),
        ("label_table.json", "{", "broken_record", "not valid JSON"),
        ("label_table.json", "[1]", "broken_record", "must be an object"),
        ("label_table.json", '{"7": "a", "#000000": "b"}', "broken_record", "numbers and colours"),
        ("label_table.json", '{"7": "a", "7": "b"}', "duplicate", "'7' stands twice"),
        ("label_table.json", '{"#ff0000": "a", "255,0,0": "b"}', "duplicate", "'255,0,0' stands twice"),
        ("label_table.json", '{"256,0,0": "a"}', "broken_record", "'256,0,0' is neither a number nor a colour"),
        ("label_table.json", '{"red": "a"}', "broken_record", "'red' is neither a number nor a colour"),
        ("label_table.json", '{"7": 3}', "broken_record", "'7' has the name 3"),
        ("label_table.json", '{"7": null}', "broken_record", "names no class"),
        ("class_dict.csv", "name,r,g\na,1,2\n", "broken_record", "missing: b"),
        ("class_dict.csv", "name,r,g,b\na,1,2\n", "broken_record", "line 2 has 3 of 4 columns"),
        ("labelmap.txt", "road\n", "broken_record", "line 1 must be name:r,g,b::"),
        ("table.yaml", "", "broken_record", "must end with .json, .csv, .txt"),
    ],
)
def test_broken_tables_are_named(tmp_path: Path, name: str, text: str, kind: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DatasetError) as raised:
        read_label_table(tmp_path / name)
    assert message in str(raised.value)
    assert name in str(raised.value)
    assert raised.value.problem.kind == kind


def test_missing_table(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such label table"):
        read_label_table(tmp_path / "label_table.json")


def palette_image(colours: np.ndarray, indices: np.ndarray) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8), mode="P")
    image.putpalette(colours.reshape(-1).tolist())
    return image


def rgba_image(colours: np.ndarray, indices: np.ndarray) -> Image.Image:
    alpha = np.arange(indices.size, dtype=np.uint8).reshape(*indices.shape, 1)  # says nothing about the class
    return Image.fromarray(np.concatenate([colours[indices], alpha], axis=-1))


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
@pytest.mark.parametrize(
    "make", [palette_image, rgba_image, lambda colours, indices: Image.fromarray(colours[indices])]
)
def test_colours_are_read_exactly(tmp_path: Path, suffix: str, make: Callable) -> None:
    image = make(COLOURS, INDICES)
    if suffix == ".bmp" and image.mode == "RGBA":
        pytest.skip("BMP files of PIL hold no alpha")
    image.save(tmp_path / f"a{suffix}")
    (tmp_path / "class_dict.csv").write_text(TABLES["class_dict.csv"])
    labels, unknown = read_labels(tmp_path / f"a{suffix}", read_label_table(tmp_path / "class_dict.csv"))
    np.testing.assert_array_equal(labels, LABELS)
    assert unknown == {}


def test_a_palette_without_colours_in_the_table_is_read_by_index(tmp_path: Path) -> None:
    palette_image(COLOURS, INDICES).save(tmp_path / "a.png")
    labels, unknown = read_labels(tmp_path / "a.png", read_label_table({"0": "x", "2": "y", "3": "x", "1": None}))
    np.testing.assert_array_equal(labels, np.array([0, 255, 1, 0])[INDICES])
    assert unknown == {}


def test_grey_and_sixteen_bit_values(tmp_path: Path) -> None:
    Image.fromarray((INDICES * 60).astype(np.uint8)).save(tmp_path / "g.png")
    labels, _ = read_labels(tmp_path / "g.png", read_label_table({"#000000": "a", "60,60,60": "b", "#787878": "c"}))
    np.testing.assert_array_equal(labels, np.array([0, 1, 2, 255])[INDICES])
    Image.fromarray((INDICES * 1000).astype(np.uint16)).save(tmp_path / "w.png")
    table = read_label_table({"0": "a", "1000": "b", "2000": "c"})
    labels, unknown = read_labels(tmp_path / "w.png", table)
    np.testing.assert_array_equal(labels, np.array([0, 1, 2, 255])[INDICES])
    assert unknown == {3000: 2}


def test_random_maps_equal_a_lookup_by_pixel(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (40, 3), dtype=np.uint8)
    table = read_label_table({tuple(colour): f"class {number}" for number, colour in enumerate(colours.tolist())})
    indices = rng.integers(0, 40, (31, 47))
    Image.fromarray(colours[indices]).save(tmp_path / "a.png")
    labels, unknown = read_labels(tmp_path / "a.png", table)
    np.testing.assert_array_equal(labels, indices)
    assert (labels.dtype, unknown) == (np.uint8, {})


@pytest.fixture
def colour_folder(tmp_path: Path) -> Path:
    """Two images with labels in colours; the second has one pixel of a colour that no class has."""
    root = tmp_path / "colours"
    for part in ("images", "labels"):
        (root / "train" / part).mkdir(parents=True)
    for name in "ab":
        colours = COLOURS[INDICES]
        if name == "b":
            colours[0, 0] = (127, 64, 128)
        Image.fromarray(colours).save(root / "train" / "labels" / f"{name}.png")
        Image.new("RGB", (4, 2)).save(root / "train" / "images" / f"{name}.jpg")
    (root / "class_dict.csv").write_text(TABLES["class_dict.csv"])
    return root


def test_an_unknown_colour_is_named_with_its_neighbour(
    colour_folder: Path, cache_dir: str, read_rows: Callable
) -> None:
    message = (
        "colours that .*class_dict.csv does not have: #7f4080 \\(127, 64, 128\\) of 1 pixels, "
        "nearest is 'road' #804080 \\(128, 64, 128\\)"
    )
    with pytest.raises(DatasetError, match=message) as raised:
        load(colour_folder, cache_dir=cache_dir)
    file = str(colour_folder / "train" / "labels" / "b.png")
    assert (raised.value.problem.kind, raised.value.problem.file) == ("unknown_label", file)
    rows, problems = read_rows(colour_folder, "list")
    assert [(problem.kind, problem.file) for problem in problems.found] == [("unknown_label", file)]
    assert [[segment["area"] for segment in row["segments"]] for row in rows] == [[3, 2, 1], [2, 2, 1]]


def test_the_table_is_found_or_given(colour_folder: Path, cache_dir: str) -> None:
    (colour_folder / "train" / "labels" / "b.png").write_bytes(
        (colour_folder / "train" / "labels" / "a.png").read_bytes()
    )
    data = load(colour_folder, cache_dir=cache_dir)
    np.testing.assert_array_equal(data.reference(0), LABELS)
    assert data.sample(1).class_labels.tolist() == [0, 1, 2]
    given = {ROAD: "ground", CAR: "thing", SKY: None, VOID: None}
    data = load(colour_folder, cache_dir=cache_dir, label_table=given)
    assert data.label_spec.id2label == {0: "ground", 1: "thing"}
    np.testing.assert_array_equal(data.reference(0), np.where(LABELS == 2, 255, LABELS))


def test_values_that_a_table_lacks_are_named(semantic_folder: Path, cache_dir: str, read_rows: Callable) -> None:
    (semantic_folder / "label_table.json").write_text(json.dumps({"0": "road", "1": "tree"}))
    with pytest.raises(DatasetError, match=r"1\.png: values that .*label_table\.json does not have: 2 \(48 pixels\)"):
        load(semantic_folder, cache_dir=cache_dir)
    rows, problems = read_rows(semantic_folder, "list")
    assert [(problem.kind, Path(problem.file).name) for problem in problems.found] == [("unknown_label", "1.png")]
    assert [len(row["segments"]) for row in rows] == [2, 0]


def test_jpeg_labels_are_refused(colour_folder: Path, cache_dir: str, read_rows: Callable) -> None:
    labels = colour_folder / "train" / "labels"
    Image.fromarray(COLOURS[INDICES]).save(labels / "b.jpg")
    (labels / "b.png").unlink()
    with pytest.raises(DatasetError, match=r"b\.jpg: \.jpg files change the values of pixels"):
        load(colour_folder, cache_dir=cache_dir)
    _, problems = read_rows(colour_folder, "list")
    found = {(problem.kind, Path(problem.file).name) for problem in problems.found}
    assert found == {("unknown_label", "b.jpg")}


def test_a_large_colour_map_is_read_fast(tmp_path: Path) -> None:
    """Looking up runs takes milliseconds; a mask for each of 30 colours would take over ten times as long."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (30, 3), dtype=np.uint8)
    table = read_label_table({tuple(colour): str(number) for number, colour in enumerate(colours.tolist())})
    indices = np.kron(rng.integers(0, 30, (32, 32)), np.ones((32, 32), dtype=int))
    Image.fromarray(colours[indices]).save(tmp_path / "a.png")
    seconds = {}
    for name, read in (
        ("open", lambda: np.asarray(Image.open(tmp_path / "a.png"))),
        ("labels", lambda: read_labels(tmp_path / "a.png", table)),
    ):
        times = []
        for _ in range(5):
            start = time.process_time()
            read()
            times.append(time.process_time() - start)
        seconds[name] = min(times)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png", table)[0], indices)
    assert seconds["labels"] < seconds["open"] + 0.05
