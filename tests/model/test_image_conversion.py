"""Images of every kind become the same three channels, or are refused by name."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor

LABELS = {0: "road", 1: "car", 2: "sky"}
PLAIN = {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_pad": False}


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
