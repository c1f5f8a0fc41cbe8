"""Every form of annotation becomes masks and labels; wrong values are named with their image."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor
from hf_maskformer.model.masks import encode_rle, ids_to_panoptic_png
from hf_maskformer.model.target_encoding import IdMap

LABELS = {0: "road", 1: "car", 2: "sky"}
PLAIN = {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_pad": False}


def photo(height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tiny(**kwargs) -> HfMaskFormerImageProcessor:
    """A processor that leaves images as they are, with the three labels."""
    return HfMaskFormerImageProcessor(**{**PLAIN, "id2label": LABELS, **kwargs})


class TestSemanticMaps:
    def test_one_mask_per_label_present(self):
        label_map = np.array([[0, 2], [255, 2]], dtype=np.uint8)
        features = tiny()(photo(2, 2), segmentation_maps=label_map)
        assert features["class_labels"][0].tolist() == [0, 2]
        assert features["class_labels"][0].dtype == torch.int64
        assert features["mask_labels"][0].int().tolist() == [[[1, 0], [0, 0]], [[0, 1], [0, 1]]]

    def test_nothing_is_ignored_if_ignore_index_is_none(self):
        label_map = np.array([[0, 2], [255, 2]], dtype=np.uint8)
        features = tiny(id2label=None)(photo(2, 2), segmentation_maps=label_map, ignore_index=None)
        assert features["class_labels"][0].tolist() == [0, 2, 255]
        with pytest.raises(ValueError, match=r"image 0: label 255 is not in id2label, allowed: 0\.\.2"):
            tiny(ignore_index=None)(photo(2, 2), segmentation_maps=label_map)
        with pytest.raises(ValueError, match="image 0: label -1 is negative; ignore_index is None"):
            tiny(ignore_index=None)(photo(2, 2), segmentation_maps=label_map.astype(int) - 1)
        reduced = tiny(ignore_index=None)(photo(2, 2), segmentation_maps=label_map % 255, do_reduce_labels=True)
        assert reduced["class_labels"][0].tolist() == [1]
        with pytest.raises(ValueError, match=r"instance id 255 is not in .*; ignore_index is None, so every pixel"):
            tiny(ignore_index=None)(photo(2, 2), segmentation_maps=label_map, instance_id_to_semantic_id={0: 1, 2: 1})

    def test_empty_map_gives_no_mask(self):
        features = tiny()(photo(2, 2), segmentation_maps=np.full((2, 2), 255))
        assert features["mask_labels"][0].shape == (0, 2, 2)
        assert features["class_labels"][0].shape == (0,)

    @pytest.mark.parametrize("name", ["do_reduce_labels", "reduce_labels"])
    def test_void_stays_void_when_labels_are_reduced(self, name, tmp_path):
        """255 became class 254, and the old name was silently ignored."""
        label_map = np.array([[0, 1], [3, 255]], dtype=np.uint8)
        expected = ([0, 2], [[[0, 1], [0, 0]], [[0, 0], [1, 0]]])
        by_constructor = tiny(**{name: True})
        by_constructor.save_pretrained(tmp_path)
        for processor, call in (
            (by_constructor, {}),
            (tiny(), {name: True}),
            (HfMaskFormerImageProcessor.from_pretrained(tmp_path), {}),
            (HfMaskFormerImageProcessor.from_dict(tiny().to_dict(), **{name: True}), {}),
        ):
            features = processor(photo(2, 2), segmentation_maps=label_map, **call)
            assert (features["class_labels"][0].tolist(), features["mask_labels"][0].int().tolist()) == expected
        with pytest.raises(ValueError, match="contradicts"):
            tiny(reduce_labels=True, do_reduce_labels=False)

    def test_wrong_labels_name_image_value_and_range(self):
        """Label K of 1-based data was trained as "no object"."""
        maps = [np.zeros((2, 2), int), np.array([[1, 3], [2, 1]])]
        with pytest.raises(ValueError, match=r"image 1: label 3 .* allowed: 0..2; the labels look 1-based"):
            tiny()([photo(2, 2)] * 2, segmentation_maps=maps)
        with pytest.raises(ValueError, match="label -1 is negative"):
            tiny()(photo(2, 2), segmentation_maps=np.array([[-1, 0], [0, 0]]))
        with pytest.raises(ValueError, match="label -1 is negative"):
            tiny(id2label=None, do_reduce_labels=True)(photo(2, 2), segmentation_maps=np.array([[-1, 0], [0, 0]]))
        with pytest.raises(ValueError, match=r"image 0.*must hold integers, got float64"):
            tiny()(photo(2, 2), segmentation_maps=np.zeros((2, 2)))

    def test_ignore_index_that_is_a_label_is_refused(self):
        with pytest.raises(ValueError, match="ignore_index 0 is also the label 'road'"):
            tiny(ignore_index=0)

    def test_size_mismatch_is_refused(self):
        """Image and map of different size were accepted."""
        with pytest.raises(
            ValueError, match=r"image 0: segmentation map has size \[4, 5\] .* the image has \[2, 2\]$"
        ):
            tiny()(photo(2, 2), segmentation_maps=np.zeros((4, 5), int))
        with pytest.raises(ValueError, match="EXIF"):
            tiny()(photo(2, 3), segmentation_maps=np.zeros((3, 2), int))
        with pytest.raises(ValueError, match="2 images, got 1 entries"):
            tiny()([photo(2, 2)] * 2, segmentation_maps=[np.zeros((2, 2), int)])

    @pytest.mark.parametrize("form", ["numpy", "torch", "pil", "pil palette", "channel first"])
    def test_forms(self, form):
        array = np.array([[0, 1], [1, 2]], dtype=np.uint8)
        palette = Image.fromarray(array).convert("P")
        palette.putdata(array.reshape(-1).tolist())
        forms = {
            "numpy": array,
            "torch": torch.from_numpy(array),
            "pil": Image.fromarray(array),
            "pil palette": palette,
            "channel first": array[None],
        }
        features = tiny()(photo(2, 2), segmentation_maps=forms[form])
        assert features["class_labels"][0].tolist() == [0, 1, 2]

    def test_colours_without_a_record_are_refused(self):
        with pytest.raises(ValueError, match="panoptic RGB PNG needs its record in annotations"):
            tiny()(photo(2, 2), segmentation_maps=photo(2, 2))


class TestInstanceMaps:
    def test_dict_gives_the_labels(self):
        ids = np.array([[7, 7], [9, 255]])
        features = tiny()(photo(2, 2), segmentation_maps=ids, instance_id_to_semantic_id={7: 1, 9: 1})
        assert features["class_labels"][0].tolist() == [1, 1]
        assert features["mask_labels"][0].int().tolist() == [[[1, 1], [0, 0]], [[0, 0], [1, 0]]]

    def test_instance_255_is_an_instance_when_the_dict_names_it(self):
        """Instance id 255 was dropped as void."""
        ids = np.array([[254, 255], [256, 256]])
        table = {254: 1, 255: 1, 256: 255}
        features = tiny()(photo(2, 2), segmentation_maps=ids, instance_id_to_semantic_id=table)
        assert features["mask_labels"][0].int().tolist() == [[[1, 0], [0, 0]], [[0, 1], [0, 0]]]

    def test_missing_id_names_image_and_id(self):
        """A missing background key was `KeyError: 0`."""
        with pytest.raises(ValueError, match="image 1: instance id 0 is not in instance_id_to_semantic_id"):
            tiny()(
                [photo(2, 2)] * 2,
                segmentation_maps=[np.full((2, 2), 5), np.array([[5, 5], [5, 0]])],
                instance_id_to_semantic_id=[{5: 1}, {5: 1}],
            )

    def test_instance_255_without_entry_is_an_error_if_it_is_not_the_ignore_index(self):
        with pytest.raises(ValueError, match="instance id 255 is not in"):
            tiny(ignore_index=-1)(photo(2, 2), np.full((2, 2), 255), instance_id_to_semantic_id={1: 1})

    def test_reduced_labels(self):
        ids = np.array([[0, 4], [5, 6]])
        features = tiny(do_reduce_labels=True)(
            photo(2, 2), segmentation_maps=ids, instance_id_to_semantic_id={4: 1, 5: 3, 6: 0}
        )
        assert features["class_labels"][0].tolist() == [0, 2]

    def test_label_outside_is_refused(self):
        with pytest.raises(ValueError, match="image 0: label 3"):
            tiny()(photo(2, 2), np.full((2, 2), 1), instance_id_to_semantic_id={1: 3})


class TestAnnotations:
    RECORD = {  # noqa: RUF012 - a constant
        "image_id": 42,
        "annotations": [
            {"id": 1, "segmentation": [[0, 0, 4, 0, 4, 2, 0, 2]], "category_id": 1, "iscrowd": 0},
            {"id": 2, "segmentation": {"size": [4, 6], "counts": [0, 24]}, "category_id": 2, "iscrowd": 1},
            {"id": 3, "segmentation": encode_rle(np.eye(4, 6, dtype=bool)), "category_id": 0},
        ],
    }

    def test_coco_instances_keep_overlap_and_skip_crowds(self):
        """COCO users had to draw a map, in which overlapping objects are lost."""
        features = tiny()(photo(4, 6), annotations=self.RECORD)
        assert features["class_labels"][0].tolist() == [1, 0]
        first, second = features["mask_labels"][0]
        assert first.int().tolist() == [[1, 1, 1, 1, 0, 0]] * 2 + [[0] * 6] * 2
        assert torch.equal(second, torch.eye(4, 6).bool())
        assert (first & second).sum() == 2

    def test_errors_name_image_and_value(self):
        record = copy.deepcopy(self.RECORD)
        record["annotations"][0]["category_id"] = 90
        with pytest.raises(ValueError, match=r"image 0 \(image_id 42\): label 90 .* 0..2"):
            tiny()(photo(4, 6), annotations=record)
        with pytest.raises(
            ValueError, match=r"image_id 42\): annotation 3: RLE has size \[4, 6\], the image .*\[5, 6\]"
        ):
            tiny()(photo(5, 6), annotations=self.RECORD)
        record = copy.deepcopy(self.RECORD)
        record["annotations"][0]["segmentation"] = [[0, 0, 1, 1]]
        with pytest.raises(ValueError, match="annotation 1: polygon 0 must be a flat list of at least 3 points"):
            tiny()(photo(4, 6), annotations=record)

    def test_coco_panoptic_with_its_png(self):
        """The RGB panoptic PNG was a ValueError."""
        ids = np.array([[70000, 70000, 0], [300, 300, 5]])
        record = {
            "file_name": "a.png",
            "segments_info": [
                {"id": 70000, "category_id": 1, "iscrowd": 0},
                {"id": 300, "category_id": 2},
                {"id": 5, "category_id": 1, "iscrowd": 1},
            ],
        }
        for png in (ids_to_panoptic_png(ids), Image.fromarray(ids_to_panoptic_png(ids)), ids):
            features = tiny()(photo(2, 3), segmentation_maps=png, annotations=record)
            assert features["class_labels"][0].tolist() == [1, 2]
            assert features["mask_labels"][0].int().tolist() == [[[1, 1, 0], [0, 0, 0]], [[0, 0, 0], [1, 1, 0]]]
        record["segments_info"].pop()
        with pytest.raises(ValueError, match=r"image 0 \(file_name a.png\): segment id 5 .* not in segments_info"):
            tiny()(photo(2, 3), segmentation_maps=ids, annotations=record)
        with pytest.raises(ValueError, match=r"got keys \['file_name', 'segments_info'\]"):
            tiny()(photo(2, 3), annotations=record)

    def test_batch(self):
        features = tiny()([photo(4, 6)] * 2, annotations=[self.RECORD, {"image_id": 1, "annotations": []}])
        assert [len(masks) for masks in features["mask_labels"]] == [2, 0]
        assert features["mask_labels"][1].shape == (0, 4, 6)


class TestMasks:
    def test_overlapping_masks_in_every_form(self):
        """(N, H, W) masks were a ValueError."""
        masks = np.array([[[1, 1], [0, 0]], [[1, 0], [1, 0]]], dtype=bool)
        for form in (
            masks,
            torch.from_numpy(masks),
            masks.astype(np.uint8) * 255,
            masks.astype(np.float32),
            [encode_rle(mask) for mask in masks],
            list(masks),
        ):
            for single in (True, False):
                images, given, labels = photo(2, 2), form, [2, 0]
                if not single:
                    images, given, labels = [images], [given], [labels]
                features = tiny()(images, masks=given, class_labels=labels)
                assert torch.equal(features["mask_labels"][0], torch.from_numpy(masks))
                assert features["class_labels"][0].tolist() == [2, 0]

    def test_no_mask(self):
        for masks in (np.zeros((0, 2, 2), dtype=bool), []):
            features = tiny()([photo(2, 2)], masks=[masks], class_labels=[[]])
            assert features["mask_labels"][0].shape == (0, 2, 2)
            assert features["class_labels"][0].dtype == torch.int64

    def test_a_mask_that_vanishes_is_left_out_with_its_label(self):
        masks = np.zeros((2, 64, 64), dtype=bool)
        masks[0, 0, 0], masks[1, 32:] = True, True
        processor = HfMaskFormerImageProcessor(size={"max_height": 8, "max_width": 8})
        features = processor(photo(64, 64), masks=masks, class_labels=[1, 2])
        assert features["class_labels"][0].tolist() == [2]
        assert features["mask_labels"][0].sum() == 32

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"masks": np.zeros((1, 2, 2), bool)}, "given together"),
            ({"masks": np.zeros((1, 2, 2), bool), "class_labels": [0, 1]}, "image 0: 1 masks"),
            ({"masks": np.zeros((1, 2, 3), bool), "class_labels": [0]}, r"image 0: mask 0 has size \[2, 3\]"),
            ({"masks": np.full((1, 2, 2), 2), "class_labels": [0]}, r"must hold 0 and 1 .* got the values \[2\]"),
            ({"masks": np.ones((1, 2, 2), bool), "class_labels": [3]}, "image 0: label 3 .*look 1-based"),
            ({"masks": np.ones((1, 2, 2), bool), "class_labels": [0.5]}, "must be integers"),
            ({"masks": [], "class_labels": [], "segmentation_maps": np.zeros((2, 2), int)}, "give either masks"),
            ({"instance_id_to_semantic_id": {1: 1}}, "needs segmentation_maps"),
        ],
    )
    def test_contradictions_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            tiny()(photo(2, 2), **arguments)

    def test_one_label_for_an_image_of_a_list_is_refused(self):
        with pytest.raises(ValueError, match=r"image 0: class_labels must be a list of 1 label ids.* got 2"):
            tiny()([photo(2, 2)], masks=[np.ones((1, 2, 2), bool)], class_labels=[2])

    def test_masks_are_read_one_by_one(self):
        """Something that has a length and makes each mask when it is asked for, into a padded result."""

        class OnDemand:
            def __len__(self):
                return 3

            def __iter__(self):
                return iter([np.eye(2, 3, dtype=bool), np.zeros((2, 3), dtype=bool), np.ones((2, 3), dtype=bool)])

        processor = tiny(do_pad=True, pad_size={"height": 4, "width": 5})
        features = processor([photo(2, 3)], masks=[OnDemand()], class_labels=[[2, 1, 0]])
        expected = torch.zeros(2, 4, 5, dtype=torch.bool)
        expected[0, :2, :3], expected[1, :2, :3] = torch.eye(2, 3).bool(), True
        assert torch.equal(features["mask_labels"][0], expected)
        assert features["class_labels"][0].tolist() == [2, 0]


# --- id maps, beside one mask after the other ------------------------------------------------------------------------

SIZES = [((24, 31), (37, 53)), ((24, 31), (7, 5)), ((9, 40), (30, 11)), ((6, 5), (6, 5))]  # of a map, resized
IDS = {
    np.bool_: [0, 1],
    np.uint8: [0, 1, 7, 254, 255],
    np.int16: [-3, 0, 255, 256, 300],
    np.uint16: [0, 255, 256, 40000, 65535],
    np.int32: [0, 3, 65535, 65536, 2**31 - 1],
    np.int64: [-(2**40), -1, 0, 70000, 2**33],
    np.uint64: [0, 1, 255, 256, 2**63],
}
LAYOUTS = {
    "plain": lambda ids: ids,
    "column by column": np.asfortranarray,
    "backwards": lambda ids: np.ascontiguousarray(ids[::-1, ::-1])[::-1, ::-1],
    "every second": lambda ids: np.repeat(np.repeat(ids, 2, axis=0), 2, axis=1)[::2, ::2],
    "foreign byte order": lambda ids: ids.astype(ids.dtype.newbyteorder()),
    "read-only": lambda ids: np.frombuffer(ids.tobytes(), dtype=ids.dtype).reshape(ids.shape),
}


def random_map(ids: list[int], dtype: type, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Blocks of 1 to 3 pixels; the last id stands in the first pixel only, where shrinking may lose it."""
    choice = np.random.default_rng(seed).integers(0, len(ids) - 1, size)
    ids_map = np.array(ids, dtype=dtype)[np.repeat(choice, 3, axis=1)[:, : size[1]]]
    ids_map[0, 0] = ids[-1]
    return ids_map


def one_by_one(ids_map: np.ndarray, labels: dict[int, int], size: tuple[int, int], canvas: tuple[int, int]):
    """(masks, labels): each id compared, then resized by the pixel under each centre, then padded; empty ones out."""
    rows = [int((row + 0.5) * ids_map.shape[0] / size[0]) for row in range(size[0])]
    columns = [int((column + 0.5) * ids_map.shape[1] / size[1]) for column in range(size[1])]
    masks, kept = [np.zeros((0, *canvas), dtype=bool)], []
    for value, label in labels.items():
        mask = np.zeros((1, *canvas), dtype=bool)
        mask[0, : size[0], : size[1]] = (ids_map == value)[np.ix_(rows, columns)]
        if mask.any():
            masks.append(mask)
            kept.append(label)
    return torch.from_numpy(np.concatenate(masks)), kept


def resizing(size: tuple[int, int], **settings) -> HfMaskFormerImageProcessor:
    canvas = {"height": size[0] + 3, "width": size[1] + 2}
    fixed = {"height": size[0], "width": size[1]}
    return HfMaskFormerImageProcessor(**{"size": fixed, "size_divisor": 1, "pad_size": canvas, **settings})


@pytest.mark.parametrize("dtype", IDS, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_instance_maps_equal_one_mask_after_the_other(dtype, layout):
    for size, resized in SIZES:
        ids_map = random_map(IDS[dtype], dtype, size)
        labels = {value: 5 + place for place, value in enumerate(IDS[dtype])}
        expected, kept = one_by_one(ids_map, labels, resized, (resized[0] + 3, resized[1] + 2))
        features = resizing(resized, ignore_index=-100)(
            photo(*size), segmentation_maps=LAYOUTS[layout](ids_map), instance_id_to_semantic_id=labels
        )
        assert torch.equal(features["mask_labels"][0], expected)
        assert features["class_labels"][0].tolist() == kept


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64])
def test_label_maps_equal_one_mask_after_the_other(dtype, reduced):
    values = [0, 2, 3, 120, 255, 1]
    labels = {value: value - reduced for value in sorted(values) if value != 255 and (value or not reduced)}
    for size, resized in SIZES:
        label_map = random_map(values, dtype, size)
        expected, kept = one_by_one(label_map, labels, resized, (resized[0] + 3, resized[1] + 2))
        features = resizing(resized, do_reduce_labels=reduced)(photo(*size), segmentation_maps=label_map)
        assert torch.equal(features["mask_labels"][0], expected)
        assert features["class_labels"][0].tolist() == kept


def test_the_images_of_a_batch_keep_to_their_part_of_the_block():
    """Different sizes, numbers and padding, one image without a mask; an image alone gives the same."""
    sizes = [(20, 30), (40, 17), (8, 8), (33, 33)]
    maps = [random_map([1, 2, 3, 9], np.uint8, size, seed) for seed, size in enumerate(sizes)]
    maps[2][:] = 255
    processor = HfMaskFormerImageProcessor(size={"max_height": 25, "max_width": 22})
    together = processor([photo(*size) for size in sizes], segmentation_maps=maps)
    assert [len(masks) for masks in together["mask_labels"]] == [4, 4, 0, 4]
    for index, (size, one) in enumerate(zip(sizes, maps, strict=True)):
        alone = processor(photo(*size), segmentation_maps=one)
        assert torch.equal(together["mask_labels"][index], alone["mask_labels"][0])
        assert torch.equal(together["class_labels"][index], alone["class_labels"][0])
        inside = (together["mask_labels"][index].sum(0) <= together["pixel_mask"][index]).all()
        assert inside


def test_a_segment_of_a_record_may_be_missing_in_the_png():
    record = {"segments_info": [{"id": 7, "category_id": 0}, {"id": 300, "category_id": 1}]}
    features = tiny()(photo(2, 2), segmentation_maps=np.array([[0, 300], [300, 300]]), annotations=record)
    assert features["class_labels"][0].tolist() == [1]
    assert features["mask_labels"][0].int().tolist() == [[[0, 1], [1, 1]]]


@pytest.mark.parametrize("dtype", IDS, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (12, 13)])
def test_values_of_a_map_and_the_rows_they_stand_in(dtype, size):
    ids_map = np.random.default_rng(0).choice(np.array(IDS[dtype], dtype=dtype), size)
    for array in (ids_map, np.sort(ids_map, axis=None).reshape(size), np.full_like(ids_map, IDS[dtype][-1])):
        found = IdMap.of(array)
        rows = [np.flatnonzero((array == value).any(axis=1)) for value in np.unique(array)]
        assert found.values.tolist() == np.unique(array).tolist()
        assert (found.first.tolist(), found.last.tolist()) == ([row[0] for row in rows], [row[-1] for row in rows])
