"""The part of a resized image that is kept: any chain of resizes and crops is one window and one resampling.

Resizing a whole picture to 2048 x 2048 to keep 512 x 512 of it is what this avoids: only the source pixels under the
window are read, for the image as for the masks.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image as PILImage

from hf_maskformer.data.segment_masks import SegmentMasks


@dataclass(frozen=True)
class Window:
    """Scaled size of the whole image, and top, left, height, width of what is kept, all in scaled pixels.

    After more than one resize the scaled size and the corner may be fractions; height and width never are.
    """

    scaled: tuple[float, float]
    top: float
    left: float
    height: int
    width: int

    @classmethod
    def whole(cls, size: tuple[int, int]) -> "Window":
        """The image as it is."""
        return cls(size, 0, 0, *size)

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def resized(self, size: tuple[int, int]) -> "Window":
        """What is seen now, at another size."""
        scaled = (self.scaled[0] * size[0] / self.height, self.scaled[1] * size[1] / self.width)
        return Window(scaled, self.top * size[0] / self.height, self.left * size[1] / self.width, *size)

    def cropped(self, top: int, left: int, size: tuple[int, int]) -> "Window":
        """A part of what is seen now."""
        return Window(self.scaled, self.top + top, self.left + left, *size)

    def source_rows(self, height: int) -> np.ndarray:
        """For each row of the window the nearest row of an image of this height."""
        return _nearest(self.top, self.height, self.scaled[0], height)

    def source_columns(self, width: int) -> np.ndarray:
        return _nearest(self.left, self.width, self.scaled[1], width)


def _nearest(start: float, length: int, scaled: float, source: int) -> np.ndarray:
    places = (np.arange(length) + start + 0.5) * (source / scaled)
    return np.minimum(places.astype(np.int64), source - 1)


def resample_image(image: np.ndarray, window: Window) -> np.ndarray:
    """Bilinear (h, w, 3) of a window; only the source pixels under the window are read."""
    step_y, step_x = image.shape[0] / window.scaled[0], image.shape[1] / window.scaled[1]
    box = (
        window.left * step_x,
        window.top * step_y,
        min((window.left + window.width) * step_x, image.shape[1]),
        min((window.top + window.height) * step_y, image.shape[0]),
    )
    resized = PILImage.fromarray(image).resize(
        (window.width, window.height), PILImage.Resampling.BILINEAR, box=box, reducing_gap=2.0
    )
    return np.asarray(resized)


def resample_masks(masks: SegmentMasks, window: Window) -> SegmentMasks:
    """The masks at the same window, each pixel taken from the nearest source pixel; codes are decoded only there."""
    height, width = masks.size
    return masks.take(window.source_rows(height), window.source_columns(width))
