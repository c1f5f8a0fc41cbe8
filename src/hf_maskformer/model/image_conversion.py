"""Images of any kind -> RGB tensors (3, H, W), and the sizes they are resized and padded to.

8-bit images are taken as they are, without their alpha channel (PIL's `convert("RGB")`, as in transformers'
pipelines). What has more than 8 bits has no range that could be known from its values: it is
scaled from a stated `intensity_range`, or refused. (A guess here is the classic silent error: a 16-bit photo becomes
white, floats in [0, 1] become black.)
"""

import math
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import SizeDict, get_image_size_for_max_height_width
from transformers.utils.import_utils import is_vision_available

if is_vision_available():
    from PIL import Image, ImageOps

CHANNEL_COUNTS = (1, 3, 4)
ROWS_AT_ONCE = 64
# PIL modes whose values are not 8-bit.
WIDE_PIL_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
# PIL's name of what lies in a file of 16 bits per channel, such as "RGB;16B". ("BGR;16" has 16 bits per pixel.)
WIDE_RAW_MODE = re.compile(r"[A-Za-z]+;16[BLN]")


class UnreadableImageError(ValueError):
    """A file that is no image, is damaged, or holds values that PIL cannot give; the message names it."""


def list_images(images: Any) -> tuple[list[Any], bool]:
    """The images as a flat list, and whether the caller gave a single one.

    Raises:
        ValueError: the list is empty or nested, or an array has four dimensions (it may be a volume).
    """
    single = not isinstance(images, (list, tuple))
    flat = [images] if single else list(images)
    if not flat:
        raise ValueError("images is empty, expected at least one image")
    for index, image in enumerate(flat):
        if isinstance(image, (list, tuple)):
            raise ValueError(f"image {index} is a list; images must be one image or a flat list of images")
        if getattr(image, "ndim", 0) > 3:
            raise ValueError(
                f"image {index} has shape {tuple(image.shape)}: pass a batch as a list of images; a 4-dimensional "
                "array is not read as a batch, it may be a volume"
            )
    return flat, single


def to_rgb_tensor(
    image: Any,
    where: str,
    *,
    do_rescale: bool = True,
    intensity_range: tuple[float, float] | None = None,
    input_data_format: str | None = None,
    device: str | torch.device | None = None,
    **_: Any,
) -> torch.Tensor:
    """Convert a PIL image, a path, an array or a tensor to a (3, H, W) tensor, to be read only.

    The result is uint8, except float32 for float arrays when `do_rescale` is False: those are taken as they are.
    Alpha is dropped, a single channel is repeated. `intensity_range` (low, high) is applied to every image that is
    not 8-bit: low becomes 0, high becomes 255, values outside are clipped. Where nothing has to be converted it is a
    view of what was given, and channels that were last in memory stay so: resizing reads these the fastest.

    Raises:
        ValueError: wide values without `intensity_range`, values that are not finite, an unclear channel axis.
    """
    if isinstance(image, (str, Path)):
        image = open_image(image)
    default_first = isinstance(image, torch.Tensor)
    if is_vision_available() and isinstance(image, Image.Image):
        where = f"{where} (PIL mode {image.mode})"
        image = pil_to_array(image, where)
        input_data_format = "channels_last"
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(_native_array(image))
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"{where} must be a PIL image, a numpy array, a torch tensor or a path, got {type(image)}")
    tensor = _channels_first(image if device is None else image.to(device), where, input_data_format, default_first)
    if not tensor.is_floating_point() or do_rescale:
        return _to_three_channels(_to_eight_bits(tensor, where, intensity_range))
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{where} holds values that are not finite")
    return _to_three_channels(tensor.float())


def open_image(file: str | Path | BinaryIO, where: str | None = None) -> "Image.Image":
    """Open and decode a local image file, with its EXIF rotation applied.

    Raises:
        ValueError: there is no such file.
        UnreadableImageError: it is no image, is cut off, holds several pages, or has colours of 16 bits per channel.
    """
    where = where or str(file)
    try:
        with Image.open(file) as image:
            check_channel_depth(image, where)
            check_single_page(image, where)
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise ValueError(f"{where}: no such image file") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(
            f"{where}: cannot be read as an image, it is damaged or cut off ({error})"
        ) from error


def check_single_page(image: "Image.Image", where: str) -> None:
    """Raises UnreadableImageError for stacks and animations, of which only the first page would be seen.

    A phone's MPO file holds the photograph first, and previews of it.
    """
    pages = getattr(image, "n_frames", 1)
    if pages > 1 and image.format != "MPO":
        raise UnreadableImageError(
            f"{where}: {image.format} file of {pages} pages; an image has one: save each page that is meant as a file"
        )


def check_channel_depth(image: "Image.Image", where: str) -> None:
    """Raises UnreadableImageError for colours or alpha of 16 bits per channel: decoding would keep only 8 of them.

    PIL tells it, from the file's header, only before the image is decoded.
    """
    for _decoder, _extents, _offset, arguments in getattr(image, "tile", ()):
        raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
        if image.mode not in WIDE_PIL_MODES and WIDE_RAW_MODE.fullmatch(str(raw_mode)):
            channels = str(raw_mode).partition(";")[0]
            raise UnreadableImageError(
                f"{where}: has 16 bits per channel ({channels}), of which only 8 could be read; convert it to 8 bits "
                "per channel, or to one grey channel of 16 bits, which intensity_range=(low, high) scales"
            )


def pil_to_array(image: "Image.Image", where: str) -> np.ndarray:
    """(H, W) of an image with more than 8 bits, else (H, W, 3) uint8, alpha dropped."""
    check_channel_depth(image, where)
    return np.array(image if image.mode == "RGB" or image.mode in WIDE_PIL_MODES else image.convert("RGB"))


def scale_intensities(values: torch.Tensor, intensity_range: tuple[float, float]) -> torch.Tensor:
    """Values of any type -> uint8: low becomes 0, high becomes 255, what lies outside is clipped."""
    low, high = intensity_range
    return ((values.double() - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8)


def new_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """As `torch.zeros`, for large results.

    On the CPU its memory is numpy's, which asks Linux for large pages where torch does not, and does not clear what
    the kernel has cleared: the first write to a small page costs several times what the writing does.
    """
    if device is not None and device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, dtype=torch.empty((), dtype=dtype).numpy().dtype))


def write_normalized(
    image: torch.Tensor,
    target: torch.Tensor,
    *,
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: Any,
    image_std: Any,
    **_: Any,
) -> None:
    """Write `(image * rescale_factor - image_mean) / image_std` into `target`, both (3, H, W), a few rows at a time.

    The rows stay in the cache from one step to the next, and the target is the only array of floats. The factor is
    moved into mean and standard deviation as transformers does it, so that every bit is the same.

    Raises:
        ValueError: a standard deviation is 0.
    """
    mean = std = target.new_zeros(())
    if do_normalize:
        factor = 1.0 / rescale_factor if do_rescale else 1.0
        mean, std = (target.new_tensor(value).mul_(factor).reshape(-1, 1, 1) for value in (image_mean, image_std))
        if not std.all():
            raise ValueError(f"image_std must not hold 0, got {image_std}")
    for source, values in zip(image.split(ROWS_AT_ONCE, 1), target.split(ROWS_AT_ONCE, 1), strict=True):
        values.copy_(source)
        if do_normalize:
            values.sub_(mean).div_(std)
        elif do_rescale:
            values.mul_(rescale_factor)


def resized_size(image_size: tuple[int, int], *, size: SizeDict, size_divisor: int, do_resize: bool, **_: Any) -> Any:
    """(h, w) that an image of (H, W) is resized to."""
    if not do_resize:
        return image_size
    if size.max_height:
        height, width = get_image_size_for_max_height_width(image_size, size.max_height, size.max_width)
        return max(1, height), max(1, width)
    if size.shortest_edge:
        resized = get_size_with_aspect_ratio(image_size, size.shortest_edge, size.longest_edge)
    else:
        resized = (size.height, size.width)
    return tuple(_round_up(max(1, length), size_divisor) for length in resized)


def padded_size(
    sizes: list[tuple[int, int]], *, size: SizeDict, size_divisor: int, do_pad: bool, pad_size: Any, **_: Any
) -> tuple[int, int]:
    """(H, W) of the batch; ValueError if an image does not fit."""
    height, width = (max(lengths) for lengths in zip(*sizes, strict=True))
    if not do_pad:
        if len(set(sizes)) > 1:
            raise ValueError(f"do_pad=False needs images of one size, got {sizes} after resizing")
        return height, width
    if pad_size is not None:
        canvas = (pad_size.height, pad_size.width)
    elif size.max_height:
        canvas = (size.max_height, size.max_width)
    else:
        canvas = (_round_up(height, size_divisor), _round_up(width, size_divisor))
    for index, (image_height, image_width) in enumerate(sizes):
        if image_height > canvas[0] or image_width > canvas[1]:
            raise ValueError(f"image {index} has size {[image_height, image_width]}, larger than {list(canvas)}")
    return canvas


def runs_of_one_canvas(processor: Any, image_sizes: Sequence[tuple[int, int]]) -> list[slice]:
    """Neighbours among images of (H, W) that `processor` pads to one size, as slices: batches that change no result.

    With a canvas that is all of them. Without one a network would see more padding beside a larger image.
    """
    names = ("size", "size_divisor", "do_resize", "do_pad", "pad_size")
    settings = {name: getattr(processor, name) for name in names}
    runs, start = [], 0
    canvases = [padded_size([resized_size(size, **settings)], **settings) for size in image_sizes]
    for _, run in groupby(canvases):
        end = start + len(list(run))
        runs.append(slice(start, end))
        start = end
    return runs


def _round_up(length: int, divisor: int) -> int:
    return math.ceil(length / divisor) * divisor if divisor else length


def _native_array(array: np.ndarray) -> np.ndarray:
    """The array, or a copy of it where torch cannot take it: foreign byte order, a negative stride, read-only."""
    if array.dtype.isnative and array.flags.writeable and min(array.strides, default=0) >= 0:
        return array
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def _channels_first(tensor: torch.Tensor, where: str, data_format: str | None, default_first: bool) -> torch.Tensor:
    """(H, W), (C, H, W) or (H, W, C) -> (C, H, W). Where both ends fit, tensors have channels first, arrays last."""
    if tensor.ndim == 2:
        return tensor[None]
    if tensor.ndim != 3 or 0 in tensor.shape:
        raise ValueError(f"{where} must have shape (H, W), (C, H, W) or (H, W, C), got {tuple(tensor.shape)}")
    if data_format is None:
        first, last = tensor.shape[0] in CHANNEL_COUNTS, tensor.shape[-1] in CHANNEL_COUNTS
        if not first and not last:
            raise ValueError(f"{where} has shape {tuple(tensor.shape)}: no axis has 1, 3 or 4 channels")
        data_format = "channels_first" if first and (default_first or not last) else "channels_last"
    return tensor if str(getattr(data_format, "value", data_format)) == "channels_first" else tensor.permute(2, 0, 1)


def _to_eight_bits(tensor: torch.Tensor, where: str, intensity_range: tuple[float, float] | None) -> torch.Tensor:
    if tensor.dtype == torch.uint8:
        return tensor
    if tensor.dtype == torch.bool:
        return tensor.to(torch.uint8) * 255
    values = tensor.double()
    if not torch.isfinite(values).all():
        raise ValueError(f"{where} holds values that are not finite")
    if intensity_range is None:
        low, high = values.min().item(), values.max().item()
        hint = " (for floats that are already scaled: do_rescale=False)" if tensor.is_floating_point() else ""
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"{where} has dtype {dtype} and values {low:g}..{high:g}: pass uint8, or say which values are black and "
            f"white with intensity_range=(low, high){hint}"
        )
    return scale_intensities(values, intensity_range)


def _to_three_channels(tensor: torch.Tensor) -> torch.Tensor:
    channels = tensor.shape[0]
    return tensor.expand(3, -1, -1) if channels == 1 else tensor[:3]  # (3, H, W)
