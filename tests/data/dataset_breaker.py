"""Copies small parts of real data sets and breaks them in many ways, each of which `inspect_dataset` has to find.

Every breaker returns what it planted: the kind of the problem, the file that must be named, and words that must stand
in the message.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

BROKEN_TEXT = b"this is not what the name of the file says"
TRAIN_FILES, VAL_FILES = 20, 4


@dataclass(frozen=True)
class Planted:
    """One damage: `words` stand in the message of the problem that must be found."""

    kind: str
    file: str
    words: tuple[str, ...] = ()


# --- copies ----------------------------------------------------------------------------------------------------------


def copy_pairs(source: Path, target: Path, train: int = TRAIN_FILES, val: int = VAL_FILES) -> Path:
    """A few images and labels of each split, with id2label.json."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("train", "val"), copy_function=shutil.copyfile)
    for split, count in (("train", train), ("val", val)):
        for part in ("images", "labels"):
            folder = target / split / part
            folder.mkdir(parents=True)
            for file in sorted((source / split / part).iterdir())[:count]:
                shutil.copyfile(file, folder / file.name)
    return target


# --- damage of single files ------------------------------------------------------------------------------------------


def cut(path: Path, keep: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def change_png(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrites a label PNG; `change` gets a copy of its values."""
    with Image.open(path) as image:
        values = np.array(image)
    Image.fromarray(change(values)).save(path)


def set_pixel(value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[3, 4] = value
        return values

    return change


# --- pairs of images and labels --------------------------------------------------------------------------------------


class PairBreaker:
    """Hands out the pairs of `train/images` and `train/labels` one after the other and notes what was done to them."""

    def __init__(self, root: Path, label_suffix: str) -> None:
        self.root, self.train, self.val = root, root / "train", root / "val"
        self.label_suffix = label_suffix
        self.planted: list[Planted] = []
        self._images = iter(sorted((self.train / "images").iterdir()))

    def take(self) -> tuple[Path, Path]:
        image = next(self._images)
        return image, self.train / "labels" / f"{image.name.partition('.')[0]}{self.label_suffix}"

    def plant(self, kind: str, file: Path, *words: str) -> None:
        self.planted.append(Planted(kind, str(file.relative_to(self.root)), words))

    def no_partner(self) -> None:
        image, label = self.take()
        label.unlink()
        self.plant("missing_file", image)
        image, label = self.take()
        image.unlink()
        self.plant("missing_file", label)

    def copies(self) -> None:
        """A pair that stands in train twice, and one that stands in val too."""
        for split, name, words in ((self.train, "twin", ()), (self.val, "leak", ("train",))):
            image, label = self.take()
            copied = split / "images" / f"{name}.{image.name.partition('.')[2]}"
            shutil.copyfile(image, copied)
            shutil.copyfile(label, split / "labels" / f"{name}{self.label_suffix}")
            self.plant("duplicate", copied, image.name, *words)

    def note(self) -> None:
        file = self.train / "images" / "notes.txt"
        file.write_bytes(BROKEN_TEXT)
        self.plant("unlisted_file", file)


# --- semantic maps ---------------------------------------------------------------------------------------------------


def break_semantic_maps(root: Path) -> list[Planted]:
    """Damage of `SPLIT/images` + `SPLIT/labels` in 16 ways."""
    breaker = PairBreaker(root, ".png")
    _break_bytes(breaker)
    _break_values(breaker)
    breaker.no_partner()
    breaker.copies()
    image, _ = breaker.take()
    with Image.open(image) as picture:
        picture.transpose(Image.Transpose.ROTATE_180).save(image.with_suffix(".bmp"))
    breaker.plant("duplicate", image, image.with_suffix(".bmp").name)
    breaker.note()
    return breaker.planted


def _break_bytes(breaker: PairBreaker) -> None:
    image, _ = breaker.take()
    image.write_bytes(b"")
    breaker.plant("unreadable_file", image)
    image, _ = breaker.take()
    cut(image)  # the header is whole: only decoding finds it
    breaker.plant("unreadable_file", image, "cut off")
    image, _ = breaker.take()
    image.write_bytes(BROKEN_TEXT)
    breaker.plant("unreadable_file", image)
    _, label = breaker.take()
    cut(label)
    breaker.plant("unreadable_file", label)
    for content in (b"", BROKEN_TEXT):
        _, label = breaker.take()
        label.write_bytes(content)
        breaker.plant("unreadable_file", label)


def _break_values(breaker: PairBreaker) -> None:
    _, label = breaker.take()
    change_png(label, set_pixel(99))
    breaker.plant("unknown_label", label, "99")
    _, label = breaker.take()
    change_png(label, lambda values: values[:, :-7])
    breaker.plant("size_mismatch", label)
    _, label = breaker.take()
    change_png(label, lambda values: np.repeat(values[..., None] * 20 + 3, 3, axis=2))
    breaker.plant("unreadable_file", label, "RGB")
    image, label = breaker.take()
    change_png(label, lambda values: np.full_like(values, 255))
    breaker.plant("empty_mask", image)


# --- volumes ---------------------------------------------------------------------------------------------------------


def break_volumes(root: Path) -> list[Planted]:
    """Damage of `SPLIT/images/*.nii.gz` + `SPLIT/labels/*.nii.gz` in 16 ways."""
    import nibabel

    breaker = PairBreaker(root, ".nii.gz")
    image, _ = breaker.take()
    image.write_bytes(b"")
    breaker.plant("unreadable_file", image)
    image, _ = breaker.take()
    cut(image)
    breaker.plant("unreadable_file", image)
    _, label = breaker.take()
    label.write_bytes(BROKEN_TEXT)
    breaker.plant("unreadable_file", label)
    _break_voxels(breaker)
    breaker.no_partner()
    breaker.copies()
    image, _ = breaker.take()
    nibabel.save(nibabel.load(image), image.with_name(image.name.removesuffix(".gz")))
    breaker.plant("duplicate", image)
    breaker.note()
    return breaker.planted


def _break_voxels(breaker: PairBreaker) -> None:
    _, label = breaker.take()
    rewrite_volume(label, lambda values: values[:-2])
    breaker.plant("size_mismatch", label)
    _, label = breaker.take()
    rewrite_volume(label, lambda values: values, affine=np.diag([1.0, 1.0, 2.5, 1.0]))
    breaker.plant("size_mismatch", label, "2.5")
    _, label = breaker.take()
    rewrite_volume(label, lambda values: np.where(values == 2, 7, values).astype(np.uint8))
    breaker.plant("unknown_label", label, "7")
    _, label = breaker.take()
    rewrite_volume(label, lambda values: (values * 0.5).astype(np.float32))
    breaker.plant("unknown_label", label, "0.5")
    image, _ = breaker.take()
    rewrite_volume(image, lambda values: np.where(values > values.mean(), np.nan, values).astype(np.float32))
    breaker.plant("unreadable_file", image, "nan")
    image, _ = breaker.take()
    rewrite_volume(image, lambda values: np.stack([values, values], axis=-1))
    breaker.plant("size_mismatch", image, "3 axes")
    _, label = breaker.take()
    rewrite_volume(label, np.zeros_like)
    breaker.plant("empty_mask", label)


def rewrite_volume(path: Path, change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None) -> None:
    import nibabel

    stored = nibabel.load(path)
    values = change(np.asanyarray(stored.dataobj))
    nibabel.save(nibabel.Nifti1Image(values, stored.affine if affine is None else affine), path)
