"""Reading image files of every kind, and what a row means for each task."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_maskformer.data.sample import Sample, check_image_size, image_size, read_image, targets_for_task
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import encode_rle

COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], dtype=np.uint8)


def save(tmp_path: Path, image: Image.Image, name: str = "x.png", **options: object) -> Path:
    path = tmp_path / name
    image.save(path, **options)
    return path


def test_rgb_png_is_read_as_it_is(tmp_path: Path) -> None:
    image = read_image(save(tmp_path, Image.fromarray(COLOURS)))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, COLOURS)


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    values = np.array([[0, 100], [200, 255]], dtype=np.uint8)
    np.testing.assert_array_equal(
        read_image(save(tmp_path, Image.fromarray(values))), np.repeat(values[..., None], 3, axis=2)
    )


def test_one_bit_becomes_black_and_white(tmp_path: Path) -> None:
    values = np.array([[True, False], [False, True]])
    image = read_image(save(tmp_path, Image.fromarray(values)))
    np.testing.assert_array_equal(image[..., 0], values * 255)


def test_palette_gives_its_colours(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 2))
    palette.putpalette(COLOURS.reshape(-1).tolist())
    palette.putdata([0, 1, 2, 3])
    np.testing.assert_array_equal(read_image(save(tmp_path, palette)), COLOURS)


def processed(path: Path) -> np.ndarray:
    """(H, W, 3) as the image processor opens a file."""
    plain = {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_pad": False}
    values = HfMaskFormerImageProcessor(**plain)(str(path))["pixel_values"]
    return values[0].permute(1, 2, 0).numpy().astype(np.uint8)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_is_dropped_as_by_the_processor_and_pil(mode: str, tmp_path: Path) -> None:
    rgba = np.concatenate([COLOURS, np.array([[[255], [0]], [[255], [128]]], dtype=np.uint8)], axis=2)
    path = save(tmp_path, Image.fromarray(rgba).convert(mode), **({"transparency": 1} if mode == "P" else {}))
    with Image.open(path) as file:
        assert file.has_transparency_data
        expected = np.asarray(file.convert("RGB"))
    image = read_image(path)
    np.testing.assert_array_equal(image, expected)
    np.testing.assert_array_equal(image, processed(path))
    if mode == "RGBA":
        np.testing.assert_array_equal(image, COLOURS)


@pytest.mark.parametrize(("colour_type", "channels"), [(2, "RGB"), (4, "LA"), (6, "RGBA")])
def test_colours_of_16_bits_are_refused(
    colour_type: int, channels: str, tmp_path: Path, deep_png: Callable[[Path, int, int], Path]
) -> None:
    """PIL keeps the high byte only: 2047 was read as 7, whatever the intensity_range."""
    path = deep_png(tmp_path / "deep.png", colour_type, 2047)
    message = rf"deep\.png: has 16 bits per channel \({channels}\).*convert it to 8 bits per channel, or to one grey"
    for read in (read_image, image_size, lambda file: read_image(file, (0, 4095)), processed):
        with pytest.raises(ValueError, match=message):
            read(path)
    with Image.open(path) as file, pytest.raises(ValueError, match=r"image 0.*has 16 bits per channel"):
        HfMaskFormerImageProcessor()(file)


def test_a_grey_png_of_16_bits_is_scaled(tmp_path: Path, deep_png: Callable[[Path, int, int], Path]) -> None:
    assert np.unique(read_image(deep_png(tmp_path / "deep.png", 0, 2047), (0, 4094))).tolist() == [128]


def test_a_colour_tiff_of_16_bits_is_refused(tmp_path: Path) -> None:
    tags = [(256, 2), (257, 2), (258, 134), (259, 1), (262, 2), (273, 140), (277, 3), (278, 2), (279, 24)]
    entries = b"".join(struct.pack("<HHII", tag, 3, 3 if tag == 258 else 1, value) for tag, value in tags)
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    content = content.ljust(134, b"\0") + struct.pack("<3H", 16, 16, 16) + struct.pack("<12H", *[2047] * 12)
    (tmp_path / "deep.tif").write_bytes(content)
    with Image.open(tmp_path / "deep.tif") as file:
        assert np.asarray(file).max() == 7, "the case of interest: PIL reads it, and cuts it"
    with pytest.raises(ValueError, match=r"deep\.tif: has 16 bits per channel \(RGB\)"):
        read_image(tmp_path / "deep.tif")


def test_cmyk_is_converted(tmp_path: Path) -> None:
    path = save(tmp_path, Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "x.jpg", quality=100)
    red, green, blue = read_image(path)[0, 0]
    assert red > 200
    assert green < 60
    assert blue < 60


def test_sixteen_bits_without_a_range_names_file_mode_values_and_flag(tmp_path: Path) -> None:
    path = save(tmp_path, Image.fromarray(np.array([[7, 3000], [40, 50]], dtype=np.uint16)))
    with pytest.raises(ValueError, match=r"x\.png: image of mode I;16 has values 7\.\.3000.*--intensity-range"):
        read_image(path)


def test_sixteen_bits_are_scaled_and_clipped(tmp_path: Path) -> None:
    path = save(tmp_path, Image.fromarray(np.array([[0, 1000], [1500, 2000], [3000, 65535]], dtype=np.uint16)))
    expected = [[0, 0], [128, 255], [255, 255]]
    image = read_image(path, intensity_range=(1000, 2000))
    for channel in range(3):
        np.testing.assert_array_equal(image[..., channel], expected)


def test_float_tiff_is_scaled(tmp_path: Path) -> None:
    path = save(tmp_path, Image.fromarray(np.array([[-1.0, 0.0], [0.5, 1.0]], dtype=np.float32)), "x.tif")
    np.testing.assert_array_equal(read_image(path, (0.0, 1.0))[..., 0], [[0, 0], [128, 255]])


def test_nan_pixels_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, Image.fromarray(np.array([[np.nan, 0.0]], dtype=np.float32)), "x.tif")
    with pytest.raises(ValueError, match="1 values that are nan"):
        read_image(path, (0.0, 1.0))


def test_empty_intensity_range_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, Image.fromarray(np.zeros((2, 2), dtype=np.uint16)))
    with pytest.raises(ValueError, match=r"low < high, got \(5, 5\)"):
        read_image(path, (5, 5))


def test_truncated_jpeg_names_the_file(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path, Image.fromarray(noise), "cut.jpg")
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ValueError, match=r"cut\.jpg: cannot be read as an image, it is damaged or cut off"):
        read_image(path)


def test_text_file_and_missing_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"x\.jpg: cannot be read"):
        read_image(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match=r"y\.jpg: no such image file"):
        read_image(tmp_path / "y.jpg")


def rotated(tmp_path: Path) -> Path:
    """Stored 3 wide and 2 high, shown turned by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((2, 3, 3), dtype=np.uint8)
    pixels[0, 0] = 255
    return save(tmp_path, Image.fromarray(pixels), "turned.png", exif=exif)


def test_exif_orientation_turns_the_image(tmp_path: Path) -> None:
    path = rotated(tmp_path)
    image = read_image(path)
    assert image.shape == (3, 2, 3)
    assert image_size(path) == (3, 2)
    np.testing.assert_array_equal(np.argwhere(image[..., 0] == 255), [[0, 1]])


def test_size_difference_by_exif_is_explained(tmp_path: Path) -> None:
    path = rotated(tmp_path)
    check_image_size(path, (3, 2), "its label")
    with pytest.raises(ValueError, match=r"turned\.png is 2x3 .* its label is 3x2; the image has an EXIF orientation"):
        check_image_size(path, (2, 3), "its label")
    with pytest.raises(ValueError, match=r"its label is 5x5$"):
        check_image_size(path, (5, 5), "its label")


SPEC = LabelSpec({0: "sky", 1: "cat", 2: "dog", 3: "grass"}, thing_label_ids=(1, 2))


def make_row() -> dict:
    """cat, sky, crowd of dogs, sky again, cat: one pixel each in a row of six; the last pixel is void."""
    segments = []
    for position, (label, crowd) in enumerate([(1, False), (0, False), (2, True), (0, False), (1, False)]):
        mask = np.zeros((1, 6), dtype=bool)
        mask[0, position] = True
        segments.append({"id": position + 1, "label_id": label, "iscrowd": crowd, "rle": encode_rle(mask)["counts"]})
    return {"height": 1, "width": 6, "segments": segments}


@pytest.mark.parametrize(
    ("task", "labels", "positions"),
    [
        ("semantic", [0, 1, 2], [[1, 3], [0, 4], [2]]),
        ("instance", [1, 1], [[0], [4]]),
        ("panoptic", [1, 1, 0], [[0], [4], [1, 3]]),
    ],
)
def test_targets_of_each_task(task: str, labels: list[int], positions: list[list[int]]) -> None:
    masks, class_labels, iscrowd = targets_for_task(make_row(), task, SPEC)
    assert class_labels.tolist() == labels
    assert [np.flatnonzero(mask[0]).tolist() for mask in masks] == positions
    assert masks.dtype == bool
    assert iscrowd.tolist() == [False] * len(labels)


def test_a_row_without_segments_gives_no_targets() -> None:
    masks, class_labels, _ = targets_for_task({"height": 3, "width": 4, "segments": []}, "panoptic", SPEC)
    assert masks.shape == (0, 3, 4)
    assert class_labels.shape == (0,)


def test_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match=r"task 'depth'.*allowed: semantic, instance, panoptic"):
        targets_for_task(make_row(), "depth", SPEC)


def test_sample_refuses_parts_that_do_not_fit() -> None:
    image = np.zeros((2, 3, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"a\.png: 1 masks, 2 class_labels"):
        Sample(image, np.ones((1, 2, 3)), np.array([0, 1]), file_name="a.png")
    with pytest.raises(ValueError, match=r"a\.png: masks have size \(3, 2\), image has \(2, 3\)"):
        Sample(image, np.ones((1, 3, 2)), np.array([0]), file_name="a.png")
