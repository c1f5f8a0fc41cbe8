"""Sources of frames, and a predictor that goes through them."""

import re
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


@pytest.mark.parametrize("bad", [["b"], ["a", "b"], ["c", "d", "e"], ["a", "b", "c", "d", "e"]])
def test_broken_frames_may_be_skipped(predictor, tmp_path, caplog, bad):
    """Batches of 2: with one of them bad, with all bad, and a folder without a good one."""
    for name in "abcde":
        Image.fromarray(picture(ord(name))).save(tmp_path / f"{name}.png")
    for name in bad:
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    good = [name for name in "abcde" if name not in bad]
    results = list(predictor.stream(tmp_path, on_bad_sample="skip"))
    assert [result.name for result in results] == good
    for name, result in zip(good, results, strict=True):
        assert result.file_name == str(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(result.image, picture(ord(name)))
    messages = [record.getMessage() for record in caplog.records if record.name.endswith("predictor")]
    assert len(messages) == len(bad)
    for name, message in zip(bad, messages, strict=True):
        assert message.startswith("skipped: ")
        assert str(tmp_path / f"{name}.png") in message


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
    with pytest.raises(ValueError, match=r"on_bad_sample 'ignore' is not allowed: raise, skip"):
        predictor.stream([], on_bad_sample="ignore")
    with pytest.raises(ValueError, match=r"a path, the number of a camera, .* got True"):
        predictor.stream(np.bool_(True))
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


@pytest.mark.parametrize(
    ("source", "handed", "name"),
    [
        ("rtsp://host:554/live", "rtsp://host:554/live", "video rtsp://host:554/live"),
        ("rtsp://me:secret@host/live", "rtsp://me:secret@host/live", "video rtsp://host/live"),
        ("http://host/x.mp4", "http://host/x.mp4", "video http://host/x.mp4"),
        ("https://host/a//x.m3u8?k=1", "https://host/a//x.m3u8?k=1", "video https://host/a//x.m3u8?k=1"),
        (np.int64(0), 0, "camera 0"),
        (np.uint8(3), 3, "camera 3"),
    ],
)
def test_urls_and_camera_numbers_reach_opencv_unchanged(monkeypatch, source, handed, name):
    given = []

    class OpenCv:
        opened = True

        @classmethod
        def VideoCapture(cls, source):
            given.append(source)
            return Capture([picture(1)], cls.opened)

    monkeypatch.setitem(sys.modules, "cv2", OpenCv)
    assert len(list(frames_of(source))) == 1
    assert given == [handed]
    assert type(given[0]) is type(handed)
    OpenCv.opened = False
    with pytest.raises(ValueError, match=f"^{re.escape(name)} cannot be opened$"):
        frames_of(source)
