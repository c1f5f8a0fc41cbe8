"""Overlays and contact sheets: what is painted where, in which colour, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from hf_maskformer.visualize import (
    ERROR,
    HATCH_DARK,
    HATCH_LIGHT,
    contact_sheet,
    draw_errors,
    draw_segments,
    fill_segments,
    id_color,
    with_class_legend,
)

GREY = np.full((60, 80, 3), 100, dtype=np.uint8)
NAMES = {0: "road", 1: "car"}


def two_segments():
    segmentation = np.zeros((60, 80), dtype=np.int32)
    segmentation[:, :30] = 4
    segmentation[20:50, 40:75] = 9
    return segmentation, [{"id": 4, "label_id": 0, "score": 0.5}, {"id": 9, "label_id": 1, "score": None}]


def blend(color):
    return np.rint(100 * 0.5 + np.array(color) * 0.5)


def test_neighbouring_ids_have_distinct_colours():
    colors = np.array([id_color(number) for number in range(40)], dtype=float)
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=2)
    for apart in range(1, 6):  # ids of objects that lie side by side
        assert np.diagonal(distances, apart).min() > 40
    np.fill_diagonal(distances, np.inf)
    assert distances.min() > 5
    assert id_color(7) == id_color(7)


def test_colours_of_segments_and_void():
    segmentation, segments = two_segments()
    picture = np.asarray(draw_segments(GREY, segmentation, segments, NAMES, labels=False)).astype(float)
    np.testing.assert_array_equal(picture[5, 10], blend(id_color(4)))
    np.testing.assert_array_equal(picture[35, 60], blend(id_color(9)))
    np.testing.assert_array_equal(picture[5, 60], [100, 100, 100])  # id 0 is in no segment
    by_label = np.asarray(draw_segments(GREY, segmentation, segments, NAMES, color_by="label", labels=False))
    np.testing.assert_array_equal(by_label[35, 60], blend(id_color(1)))


def test_border_is_one_pixel_inside_the_segment():
    segmentation, segments = two_segments()
    picture = np.asarray(draw_segments(GREY, segmentation, segments, labels=False)).astype(float)
    rim = np.rint(np.array(id_color(9)) * 0.8 + 51)
    np.testing.assert_allclose(picture[20, 60], rim, atol=1)
    np.testing.assert_array_equal(picture[21, 60], blend(id_color(9)))
    np.testing.assert_array_equal(picture[19, 60], [100, 100, 100])
    np.testing.assert_array_equal(picture[0, 10], blend(id_color(4)))  # the image's edge is no border


def test_labels_are_written_inside_and_small_segments_have_none():
    segmentation, segments = two_segments()
    plain = np.asarray(draw_segments(GREY, segmentation, segments, NAMES, labels=False))
    changed = np.any(np.asarray(draw_segments(GREY, segmentation, segments, NAMES)) != plain, axis=2)
    assert changed[20:50, 40:75].any()
    assert not changed[:20, 31:].any()
    segmentation[segmentation == 9] = 0
    segmentation[20:23, 70:74] = 9
    plain = np.asarray(draw_segments(GREY, segmentation, segments, NAMES, labels=False))
    changed = np.any(np.asarray(draw_segments(GREY, segmentation, segments, NAMES)) != plain, axis=2)
    assert not changed[:, 60:].any()


def test_legend_widens_the_picture_and_shows_the_colour():
    segmentation, segments = two_segments()
    picture = draw_segments(GREY, segmentation, segments, NAMES, legend=True, labels=False)
    assert picture.height == 60
    assert picture.width > 80 + 20
    panel = np.asarray(picture)[:, 80:].reshape(-1, 3).tolist()
    assert list(id_color(4)) in panel
    assert list(id_color(9)) in panel


def test_no_segments_leave_the_image_as_it_is():
    picture = draw_segments(Image.fromarray(GREY), np.zeros((60, 80), np.int32), [], NAMES, legend=True)
    np.testing.assert_array_equal(np.asarray(picture), GREY)


def test_grey_images_and_tiny_images():
    segmentation = np.ones((1, 1), dtype=np.int32)
    picture = draw_segments(np.zeros((1, 1), np.uint8), segmentation, [{"id": 1, "label_id": 0}], legend=True)
    assert picture.height == 1


def test_fill_segments():
    segmentation = np.array([[7, 3], [0, 7]])
    assert fill_segments(segmentation, [3, 7], [30, 70], -1).tolist() == [[70, 30], [-1, 70]]
    assert fill_segments(segmentation, [], np.zeros(0, int), 5).tolist() == [[5, 5], [5, 5]]
    colors = fill_segments(segmentation, [7], np.array([[1, 2, 3]], np.uint8), 0)
    assert colors.shape == (2, 2, 3)
    assert colors[0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"segmentation": np.zeros((8, 8), int)}, r"image's size \(60, 80\), got \(8, 8\)"),
        ({"alpha": 2.0}, r"alpha must be within 0\.\.1, got 2\.0"),
        ({"color_by": "score"}, "color_by must be 'segment' or 'label', got 'score'"),
        ({"image": np.zeros((60, 80, 3))}, "uint8 array, got float64"),
        ({"image": np.zeros((60, 80, 2), np.uint8)}, r"must have shape .* got \(60, 80, 2\)"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    segmentation, segments = two_segments()
    with pytest.raises(ValueError, match=message):
        draw_segments(**{"image": GREY, "segmentation": segmentation, "segments": segments, **arguments})


def test_contact_sheet_grid():
    images = [Image.new("RGB", (90, 60), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    sheet = contact_sheet(images, columns=2, cell_width=90)
    assert sheet.size == (2 * 90 + 3 * 6, 2 * 60 + 3 * 6)
    assert sheet.getpixel((6 + 45, 6 + 30)) == (255, 0, 0)
    assert sheet.getpixel((12 + 90 + 45, 6 + 30)) == (0, 255, 0)
    assert sheet.getpixel((6 + 45, 12 + 60 + 30)) == (0, 0, 255)
    assert sheet.getpixel((12 + 90 + 45, 12 + 60 + 30)) == (255, 255, 255)


def test_contact_sheet_titles_and_sizes():
    images = [GREY, GREY[:30], Image.fromarray(GREY)]
    plain = contact_sheet(images, columns=5)
    titled = contact_sheet(images, columns=5, titles=["a", "b", "a very long title " * 10])
    assert titled.width == plain.width
    assert titled.height > plain.height
    assert plain.width == 3 * 360 + 4 * 10  # no empty columns


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": []}, "at least one image"),
        ({"images": [GREY], "columns": 0}, "must be at least 1, got 0"),
        ({"images": [GREY], "titles": ["a", "b"]}, r"one entry per image \(1\), got 2"),
    ],
)
def test_contact_sheet_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(**arguments)


def test_rows_of_a_sheet_have_the_shape_of_their_images():
    images = [Image.new("RGB", size, (255, 0, 0)) for size in ((90, 60), (90, 60), (60, 90), (60, 90))]
    sheet = contact_sheet(images, columns=2, cell_width=90)
    assert sheet.size == (2 * 90 + 3 * 6, 60 + 135 + 3 * 6)
    assert sheet.getpixel((6 + 45, 12 + 60 + 134)) == (255, 0, 0)


@pytest.mark.parametrize(("size", "height"), [((2, 3000), 180), ((3000, 2), 1), ((60, 90), 135)])
def test_rows_of_narrow_images_are_not_endless(size, height):
    sheet = contact_sheet([Image.new("RGB", size, (255, 0, 0))] * 2, columns=2, cell_width=90)
    assert sheet.size == (2 * 90 + 3 * 6, height + 2 * 6)


def test_hatched_pixels_are_dark_and_the_others_unchanged():
    segmentation, segments = two_segments()
    void = segmentation == 0
    plain = np.asarray(draw_segments(GREY, segmentation, segments, labels=False))
    hatched = np.asarray(draw_segments(GREY, segmentation, segments, labels=False, hatched=void))
    np.testing.assert_array_equal(hatched[~void], plain[~void])
    assert {tuple(color) for color in hatched[void].tolist()} == {HATCH_DARK, HATCH_LIGHT}


def test_errors_are_red_on_a_pale_image():
    wrong = np.zeros((60, 80), dtype=bool)
    wrong[10:20] = True
    void = np.zeros((60, 80), dtype=bool)
    void[15:] = True
    picture = np.asarray(draw_errors(GREY, wrong, hatched=void)).astype(int)
    red = np.rint(0.35 * 100 + 0.65 * np.array(ERROR))
    np.testing.assert_array_equal(np.unique(picture[10:15].reshape(-1, 3), axis=0), red[None])
    np.testing.assert_array_equal(picture[0, 0], [201, 201, 201])  # 100 faded by 0.65 towards 255
    assert {tuple(color) for color in picture[15:].reshape(-1, 3).tolist()} == {HATCH_DARK, HATCH_LIGHT}


def test_class_legend_wraps_below_the_sheet():
    sheet = Image.new("RGB", (300, 50), (0, 0, 0))
    one = with_class_legend(sheet, {3: "car"})
    many = with_class_legend(sheet, {label: f"class number {label}" for label in range(12)})
    assert one.width == many.width == 300
    assert 50 < one.height < many.height
    panel = np.asarray(many)[50:].reshape(-1, 3).tolist()
    assert all(list(id_color(label)) in panel for label in range(12))
    np.testing.assert_array_equal(np.asarray(one)[:50], np.zeros((50, 300, 3)))
