"""Maps of a canvas at the size of the image: as torch interpolates, and without what stands in the padding."""

import pytest
import torch
import torch.nn.functional as F

from hf_maskformer.model.resampling import resize_maps


def random_maps(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class TestResizeMaps:
    def test_full_extent_is_interpolate(self):
        maps = random_maps(3, 9, 11)
        expected = F.interpolate(maps[None], size=(31, 20), mode="bilinear", align_corners=False)[0]
        assert torch.equal(resize_maps(maps, (31, 20)), expected)
        # the fractional path, at an extent that is not quite 1
        near = resize_maps(maps, (31, 20), (1 - 1e-9, 1 - 1e-9))
        torch.testing.assert_close(near, expected, atol=1e-7, rtol=0)

    def test_whole_cells_are_a_crop(self):
        maps = random_maps(2, 16, 12)
        expected = F.interpolate(maps[None, :, :12, :9], size=(25, 31), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(resize_maps(maps, (25, 31), (0.75, 0.75)), expected, atol=1e-12, rtol=0)

    def test_a_ramp_keeps_its_place_at_a_fractional_border(self):
        """On a canvas of 64 pixels and cells of 4, an image 41 pixels wide ends inside a cell."""
        cell_centres = (torch.arange(16, dtype=torch.float64) + 0.5) * 4
        ramp = cell_centres.expand(1, 16, 16).clone()
        resized = resize_maps(ramp, (41, 41), (41 / 64, 41 / 64))[0, 0]
        pixel_centres = torch.arange(41, dtype=torch.float64) + 0.5
        torch.testing.assert_close(resized[2:40], pixel_centres[2:40], atol=1e-10, rtol=0)

    @pytest.mark.parametrize("image_pixels", [40, 41, 43, 333])
    def test_padding_is_never_read(self, image_pixels):
        canvas, cells = 512, 128
        extent = float(torch.tensor(image_pixels / canvas))  # as it comes, in float32
        maps = random_maps(2, cells, cells)
        noisy = maps.clone()
        first_padding_cell = -(-image_pixels // 4)
        noisy[:, first_padding_cell:], noisy[:, :, first_padding_cell:] = 1e6, -1e6
        assert torch.equal(
            resize_maps(maps, (100, 77), (extent, extent)), resize_maps(noisy, (100, 77), (extent, extent))
        )
