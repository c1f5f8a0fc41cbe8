"""Sources of frames, and a predictor that goes through them."""

import sys

import numpy as np
import pytest
from PIL import Image

from hf_maskformer.inference import Predictor
from hf_maskformer.inference.frames import UniqueNames, frames_of


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, size=(20, 30, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return Predictor(checkpoint, device="cpu", batch_size=2)


def test_a_folder_is_read_in_the_order_of_its_names(predictor, tmp_path):
    for name in ("c", "a", "b"):
        Image.fromarray(picture(ord(name))).save(tmp_path / f"{name}.png")
    (tmp_path / "notes.txt").write_text("no image")
    results = list(predictor.stream(tmp_path))
    assert [result.name for result in results] == ["a", "b", "c"]
    for result, expected in zip(results, predictor([tmp_path / f"{name}.png" for name in "abc"]), strict=True):
        np.testing.assert_array_equal(result.segmentation, expected.segmentation)
        assert result.segments == expected.segments


def test_a_broken_frame_is_named_after_the_batches_before_it(predictor, tmp_path):
    for name in "abc":
        Image.fromarray(picture(0)).save(tmp_path / f"{name}.png")
    (tmp_path / "d.png").write_bytes(b"no image")
    stream = predictor.stream(tmp_path)
    assert [next(stream).name, next(stream).name] == ["a", "b"]
    with pytest.raises(ValueError, match=r"d\.png"):
        next(stream)


def test_names_are_unique_and_those_of_arrays_are_not_kept():
    names = UniqueNames()
    images = ["a/x.png", picture(0), "b/x.png", "image-0002.png", "image-0009.png", picture(1), "x-2.png"]
    assert [names.name(image, index) for index, image in enumerate(images)] == [
        "x",
        "image-0002",
        "x-2",
        "image-0002-2",
        "image-0009",
        "image-0006",
        "x-2-2",
    ]
    assert len(names.stems) == 5
    assert UniqueNames().name("image-0001.png", 3) == "image-0001"  # no image came without a file


def test_a_live_source_may_drop_frames(predictor):
    results = list(predictor.stream((picture(seed) for seed in range(30)), queue_size=1, on_full="drop"))
    numbers = [int(result.name.removeprefix("image-")) for result in results]
    assert numbers == sorted(set(numbers))
    assert 1 <= len(numbers) <= 30
    assert numbers[-1] == 30  # the newest is never dropped


def test_wrong_arguments(predictor, tmp_path):
    with pytest.raises(ValueError, match=r"on_full must be 'block' or 'drop', got 'wait'"):
        predictor.stream([], on_full="wait")
    with pytest.raises(ValueError, match=r"queue_size must be at least 1, got 0"):
        predictor.stream([], queue_size=0)
    with pytest.raises(ValueError, match=r"holds no image; known endings"):
        predictor.stream(tmp_path)
    with pytest.raises(ValueError, match=r"clip.mp4 does not exist"):
        predictor.stream(tmp_path / "clip.mp4")


def test_a_video_without_opencv_says_what_to_install(predictor, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    (tmp_path / "clip.mp4").write_bytes(b"")
    for source, name in ((tmp_path / "clip.mp4", "video .*clip.mp4"), (0, "camera 0")):
        with pytest.raises(ImportError, match=rf"{name} needs OpenCV: pip install opencv-python-headless"):
            predictor.stream(source)


class Capture:
    """In the place of OpenCV's, which tests do not need."""

    def __init__(self, frames, opened=True):
        self.frames, self.opened, self.released = list(frames), opened, False

    def isOpened(self):
        return self.opened

    def read(self):
        return (True, self.frames.pop(0)) if self.frames else (False, None)

    def release(self):
        self.released = True


@pytest.mark.parametrize("source", ["clip.mp4", 0])
def test_a_video_gives_its_frames_in_rgb(monkeypatch, tmp_path, source):
    captures = []

    class OpenCv:
        @staticmethod
        def VideoCapture(name):
            captures.append(Capture([picture(seed) for seed in (1, 2)]))
            return captures[-1]

    monkeypatch.setitem(sys.modules, "cv2", OpenCv)
    (tmp_path / "clip.mp4").write_bytes(b"")
    frames = list(frames_of(tmp_path / source if isinstance(source, str) else source))
    np.testing.assert_array_equal(frames, [picture(1)[..., ::-1], picture(2)[..., ::-1]])
    assert captures[0].released
    monkeypatch.setattr(OpenCv, "VideoCapture", lambda name: Capture([], opened=False))
    with pytest.raises(ValueError, match=r"cannot be opened"):
        frames_of(0)
    monkeypatch.setattr(OpenCv, "VideoCapture", lambda name: Capture([]))
    with pytest.raises(ValueError, match=r"frame 1 of camera 0 cannot be read"):
        list(frames_of(0))
