"""Images of every kind become the same three channels, or are refused by name."""

import copy
import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_maskformer.model.image_conversion import new_zeros, runs_of_one_canvas, to_rgb_tensor, write_normalized
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor

LABELS = {0: "road", 1: "car", 2: "sky"}
PLAIN = {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_pad": False}


def test_runs_of_one_canvas() -> None:
    sizes = [(20, 20), (31, 30), (20, 40), (40, 80), (20, 20)]
    canvas = HfMaskFormerImageProcessor(size={"max_height": 64, "max_width": 64})
    assert runs_of_one_canvas(canvas, sizes) == [slice(0, 5)]
    by_edge = HfMaskFormerImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}, size_divisor=32)
    assert runs_of_one_canvas(by_edge, sizes) == [slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 5)]
    by_edge.pad_size = type(by_edge.size)(height=64, width=64)
    assert runs_of_one_canvas(by_edge, sizes) == [slice(0, 5)]
    assert runs_of_one_canvas(by_edge, []) == []


def photo(height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tiny(**kwargs) -> HfMaskFormerImageProcessor:
    """A processor that leaves images as they are, with the three labels."""
    return HfMaskFormerImageProcessor(**{**PLAIN, "id2label": LABELS, **kwargs})


class TestImages:
    @pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "RGBA", "LA", "YCbCr"])
    def test_pil_modes_are_converted(self, mode):
        image = Image.fromarray(photo()).convert("L" if mode == "LA" else "RGB").convert(mode)
        features = tiny()(image)
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()
        assert torch.equal(features["pixel_values"][0], expected)

    @pytest.mark.parametrize("form", [str, Path])
    def test_paths_of_both_kinds(self, tmp_path, form):
        path = tmp_path / "photo.png"
        Image.fromarray(photo()).save(path)
        expected = torch.from_numpy(photo()).permute(2, 0, 1).float()
        assert torch.equal(tiny()(form(path))["pixel_values"][0], expected)
        assert torch.equal(tiny()([form(path), photo()])["pixel_values"][0], expected)

    def test_layouts_of_arrays_and_tensors(self):
        image = photo()
        expected = torch.from_numpy(image).permute(2, 0, 1).float()
        alpha = np.dstack([image, np.zeros((20, 30), dtype=np.uint8)])
        for form in (image, image.transpose(2, 0, 1), alpha, torch.from_numpy(image).permute(2, 0, 1)):
            assert torch.equal(tiny()(form)["pixel_values"][0], expected)
        assert torch.equal(tiny()(image[:, ::-1])["pixel_values"][0], expected.flip(2))
        for grey in (image[..., 0], image[..., :1], torch.from_numpy(image[..., 0])[None]):
            assert torch.equal(tiny()(grey)["pixel_values"][0], expected[:1].expand(3, -1, -1))

    def test_where_both_ends_could_be_channels(self):
        image = photo(3, 5)  # (3, 5, 3)
        last = tiny()(image)["pixel_values"]
        assert last.shape == (1, 3, 3, 5)
        assert torch.equal(tiny()(torch.from_numpy(image))["pixel_values"][0], torch.from_numpy(image).float())
        told = tiny()(torch.from_numpy(image), input_data_format="channels_last")["pixel_values"]
        assert torch.equal(told, last)

    def test_unclear_or_wrong_shapes_are_refused(self):
        with pytest.raises(ValueError, match="no axis has 1, 3 or 4 channels"):
            tiny()(np.zeros((7, 8, 9), dtype=np.uint8))
        with pytest.raises(ValueError, match=r"image 0 has shape \(2, 3, 8, 8\).*volume"):
            tiny()(np.zeros((2, 3, 8, 8), dtype=np.uint8))
        with pytest.raises(ValueError, match="images is empty"):
            tiny()([])
        with pytest.raises(ValueError, match="flat list"):
            tiny()([[photo()]])

    def test_wide_images_are_refused_without_a_range(self):
        wide = np.array([[0, 1000], [2000, 4000]], dtype=np.uint16)
        for image, kind in (
            (wide, "image 0 has dtype uint16 and values 0..4000"),
            (Image.fromarray(wide), r"image 0 \(PIL mode I;16\) has dtype uint16 and values 0..4000"),
            (Image.fromarray(wide.astype(np.int32)), r"image 0 \(PIL mode I\)"),
            (Image.fromarray(wide.astype(np.float32)), r"image 0 \(PIL mode F\)"),
            (wide.astype(np.int64), "dtype int64"),
        ):
            with pytest.raises(ValueError, match=rf"{kind}.*intensity_range"):
                tiny(do_rescale=True)(image)

    def test_wide_images_are_scaled_from_the_range(self):
        wide = np.array([[0, 1000], [2000, 4000]], dtype=np.uint16)
        expected = torch.tensor([[0.0, 0.0], [85.0, 255.0]]) / 255
        processor = tiny(do_rescale=True, intensity_range=(1000, 4000))
        for image in (
            wide,
            Image.fromarray(wide),
            wide.astype(">u2"),
            wide.astype(np.float64),
            torch.from_numpy(wide),
        ):
            torch.testing.assert_close(processor(image)["pixel_values"][0, 1], expected)

    def test_floats_that_would_be_scaled_twice_are_refused(self):
        """The classic silent error: floats in [0, 1] divided by 255 once more."""
        image = (photo() / 255).astype(np.float32)
        with pytest.raises(ValueError, match=r"dtype float32 and values 0.*do_rescale=False"):
            tiny(do_rescale=True)(image)
        assert torch.equal(tiny()(image)["pixel_values"][0], torch.from_numpy(image).permute(2, 0, 1))
        image[0, 0] = np.nan
        with pytest.raises(ValueError, match="not finite"):
            tiny()(image)

    def test_paths(self, tmp_path):
        image = Image.fromarray(photo())
        exif = image.getexif()
        exif[0x0112] = 6  # turned by 90 degrees
        image.save(tmp_path / "turned.png", exif=exif)
        assert tiny()(str(tmp_path / "turned.png"))["pixel_values"].shape == (1, 3, 30, 20)
        (tmp_path / "broken.jpg").write_bytes(b"not an image")
        with pytest.raises(ValueError, match=r"broken\.jpg: cannot be read as an image"):
            tiny()(str(tmp_path / "broken.jpg"))
        with pytest.raises(ValueError, match=r"absent\.jpg: no such image file"):
            tiny()(str(tmp_path / "absent.jpg"))

    @pytest.mark.parametrize(("name", "format"), [("stack.tif", "TIFF"), ("moving.gif", "GIF")])
    def test_files_of_several_pages_are_refused(self, tmp_path, name, format):
        """Only their first page would be seen."""
        pages = [Image.fromarray(photo(seed=seed)) for seed in range(3)]
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        with pytest.raises(ValueError, match=rf"{name}: {format} file of 3 pages"):
            tiny()(str(tmp_path / name))
        pages[0].save(tmp_path / name)
        assert tiny()(str(tmp_path / name))["pixel_values"].shape[1] == 3

    def test_the_previews_in_a_phones_file_are_no_pages(self, tmp_path):
        pages = [Image.fromarray(photo(seed=seed)) for seed in range(2)]
        pages[0].save(tmp_path / "phone.mpo", format="MPO", save_all=True, append_images=pages[1:])
        assert Image.open(tmp_path / "phone.mpo").n_frames == 2
        assert tiny()(str(tmp_path / "phone.mpo"))["pixel_values"].shape[1] == 3


class TestNormalizing:
    @pytest.mark.parametrize("size", [(3, 5), (64, 7), (65, 31), (200, 9)])
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_values_by_formula_and_nothing_beside_them(self, size, channels_last):
        image = torch.from_numpy(photo(*size)).permute(2, 0, 1)
        image = image if channels_last else image.contiguous()
        canvas = torch.full((3, size[0] + 2, size[1] + 3), 9.0)
        mean, std = [0.5, 0.25, 0.125], [0.5, 2.0, 0.25]
        settings = {"rescale_factor": 1 / 255, "image_mean": mean, "image_std": std}
        pixels = image.double()
        channels = [torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std)]
        for rescale, normalize in itertools.product((True, False), repeat=2):
            expected = pixels / 255 if rescale else pixels
            expected = (expected - channels[0]) / channels[1] if normalize else expected
            part = canvas[:, : size[0], : size[1]]
            write_normalized(image, part, do_rescale=rescale, do_normalize=normalize, **settings)
            torch.testing.assert_close(part.double(), expected, atol=1e-6, rtol=1e-6)
            assert (canvas[:, size[0] :] == 9).all()
            assert (canvas[:, :, size[1] :] == 9).all()

    def test_a_deviation_of_zero_is_refused(self):
        with pytest.raises(ValueError, match=r"image_std must not hold 0, got \(0.5, 0.0, 0.5\)"):
            HfMaskFormerImageProcessor(image_std=(0.5, 0.0, 0.5))(photo())


class TestViews:
    def test_what_torch_can_take_is_not_copied(self):
        array = photo()
        assert to_rgb_tensor(array, "image 0").data_ptr() == array.ctypes.data

    @pytest.mark.parametrize(
        "layout", ["backwards", "BGR", "read-only", "every second", "channels first", "one value"]
    )
    def test_any_layout_in_memory_gives_the_same(self, layout):
        image = photo(21, 34)
        given = {
            "backwards": np.ascontiguousarray(image[::-1, ::-1])[::-1, ::-1],
            "BGR": np.ascontiguousarray(image[..., ::-1])[..., ::-1],
            "read-only": np.frombuffer(image.tobytes(), dtype=np.uint8).reshape(image.shape),
            "every second": np.repeat(image, 2, axis=0)[::2],
            "channels first": np.ascontiguousarray(image.transpose(2, 0, 1)),
            "one value": np.broadcast_to(np.uint8(77), image.shape),
        }[layout]
        expected = np.full_like(image, 77) if layout == "one value" else image
        kept = given.copy()
        processor = HfMaskFormerImageProcessor(size={"max_height": 32, "max_width": 40})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            actual = processor(given)["pixel_values"]
        assert torch.equal(actual, processor(expected)["pixel_values"])
        assert np.array_equal(given, kept)

    @pytest.mark.parametrize(
        ("image", "settings"),
        [
            (photo(), {}),
            (photo(), {"do_resize": False}),
            (torch.from_numpy(photo()).permute(2, 0, 1), {"do_resize": False, "do_normalize": False}),
            (torch.rand(3, 20, 30), {"do_resize": False, "do_rescale": False}),
            (torch.rand(3, 20, 30), {"do_resize": False, "do_rescale": False, "do_normalize": False}),
        ],
    )
    def test_the_image_stays_what_it_was(self, image, settings):
        kept = copy.deepcopy(image)
        batch = HfMaskFormerImageProcessor(**settings)(image)
        batch["pixel_values"].fill_(9)
        assert (image == kept).all()

    def test_padding_is_zero(self):
        processor = HfMaskFormerImageProcessor(size={"max_height": 32, "max_width": 40})
        maps = [np.zeros((20, 30), dtype=np.uint8), np.zeros((30, 10), dtype=np.uint8)]
        batch = processor([photo(20, 30), photo(30, 10)], segmentation_maps=maps)
        inside = batch["pixel_mask"].bool()
        assert inside.sum(dim=(1, 2)).tolist() == [26 * 40, 32 * 10]
        assert set(batch["pixel_mask"].unique().tolist()) == {0, 1}
        assert (batch["pixel_values"].movedim(1, -1)[~inside] == 0).all()
        assert all(torch.equal(masks[0], valid) for masks, valid in zip(batch["mask_labels"], inside, strict=True))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 4)])
def test_new_zeros(shape, dtype):
    tensor = new_zeros(shape, dtype)
    assert not tensor.any()
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    assert new_zeros(shape, dtype, torch.device("meta")).device.type == "meta"
