"""Frames one after the other: of a video file, a camera, a folder, or whatever else gives images."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.*", re.DOTALL)  # a scheme of one letter would be a drive of Windows
LOGIN = re.compile(r"://[^/@]*@")  # user and password, which no message shows
NUMBERED_NAME = re.compile(r"image-(\d{4,})")

AnyInput = str | Path | Image.Image | np.ndarray


def frames_of(source: Any) -> Iterable[AnyInput]:
    """The images of a source, in their order; files of images are named, not yet read.

    Args:
        source: a video file, the URL of a video (`scheme://`) or the number of a camera (these need OpenCV), a folder
            of images (sorted by name), one image, or an iterable of images.

    Raises:
        ValueError: the source does not exist, holds no image or cannot be opened.
        ImportError: a video without OpenCV.
    """
    if isinstance(source, (bool, np.bool_)):
        raise ValueError(f"source must be a path, the number of a camera, an image or an iterable, got {source}")
    if isinstance(source, (int, np.integer)):
        return _video_frames(int(source), f"camera {source}")
    if isinstance(source, (Image.Image, np.ndarray)):
        return [source]
    if not isinstance(source, (str, Path)):
        return source
    if isinstance(source, str) and URL.fullmatch(source):  # a Path would turn its // into /
        return _video_frames(source, f"video {LOGIN.sub('://', source)}")
    path = Path(source)
    if path.is_dir():
        return folder_images(path)
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        return [source]
    if not path.is_file():
        raise ValueError(f"video {path} does not exist")
    return _video_frames(str(path), f"video {path}")


def folder_images(folder: Path) -> list[Path]:
    """Every image directly inside a folder, sorted by name.

    Raises:
        ValueError: there is none.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"folder {folder} holds no image; known endings: {', '.join(sorted(IMAGE_SUFFIXES))}")
    return files


class UniqueNames:
    """The stem of a file, or the number of an image without one; a stem that was there before gets a number.

    Only the stems of files are remembered, so that a camera may run for ever.
    """

    def __init__(self) -> None:
        self.stems: set[str] = set()
        self.numbered = False  # whether an image came without a file

    def name(self, image: AnyInput, index: int) -> str:
        """Of the image at position `index` of its source."""
        if not isinstance(image, (str, Path)):
            self.numbered = True
            return self._free(_numbered(index), index)
        name = self._free(Path(image).stem, index)
        self.stems.add(name)
        return name

    def _free(self, stem: str, index: int) -> str:
        name, number = stem, 1
        while name in self.stems or self._is_earlier_number(name, index):
            number += 1
            name = f"{stem}-{number}"
        return name

    def _is_earlier_number(self, name: str, index: int) -> bool:
        found = NUMBERED_NAME.fullmatch(name)
        return self.numbered and found is not None and int(found[1]) <= index and name == _numbered(int(found[1]) - 1)


def _numbered(index: int) -> str:
    return f"image-{index + 1:04d}"


def _video_frames(source: str | int, name: str) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 in RGB; ends with the file, or when the camera gives nothing more.

    Raises:
        ImportError: OpenCV is not installed.
        ValueError: it cannot open the source, or the first frame cannot be read.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError(f"{name} needs OpenCV: pip install opencv-python-headless") from error
    capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        capture.release()
        raise ValueError(f"{name} cannot be opened")
    return _captured(capture, name)


def _captured(capture: Any, name: str) -> Iterator[np.ndarray]:
    count = 0
    try:
        while True:
            there, frame = capture.read()
            if not there:
                break
            count += 1
            yield np.ascontiguousarray(frame[..., ::-1])  # OpenCV's order is blue, green, red
    finally:
        capture.release()
    if not count:
        raise ValueError(f"frame 1 of {name} cannot be read")
