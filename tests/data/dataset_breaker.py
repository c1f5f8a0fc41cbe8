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


# --- semantic maps ---------------------------------------------------------------------------------------------------


def break_semantic_maps(root: Path) -> list[Planted]:
    """Damage of `SPLIT/images` + `SPLIT/labels` in 16 ways."""
    train, val = root / "train", root / "val"
    files = iter(sorted((train / "images").iterdir()))
    planted: list[Planted] = []

    def take() -> tuple[Path, Path]:
        image = next(files)
        return image, train / "labels" / f"{image.stem}.png"

    def plant(kind: str, file: Path, *words: str) -> None:
        planted.append(Planted(kind, str(file.relative_to(root)), words))

    image, _ = take()
    image.write_bytes(b"")
    plant("unreadable_file", image)
    image, _ = take()
    cut(image)  # the header is whole: only decoding finds it
    plant("unreadable_file", image, "cut off")
    image, _ = take()
    image.write_bytes(BROKEN_TEXT)
    plant("unreadable_file", image)
    _, label = take()
    cut(label)
    plant("unreadable_file", label)
    _, label = take()
    label.write_bytes(b"")
    plant("unreadable_file", label)
    _, label = take()
    change_png(label, set_pixel(99))
    plant("unknown_label", label, "99")
    _, label = take()
    change_png(label, lambda values: values[:, :-7])
    plant("size_mismatch", label)
    _, label = take()
    label.unlink()
    plant("missing_file", image := train / "images" / f"{label.stem}.jpg")
    image, label = take()
    image.unlink()
    plant("missing_file", label)
    _, label = take()
    change_png(label, lambda values: np.repeat(values[..., None] * 20 + 3, 3, axis=2))
    plant("unreadable_file", label, "RGB")
    image, label = take()
    twin = image.with_name("twin.jpg")
    shutil.copyfile(image, twin)
    shutil.copyfile(label, train / "labels" / "twin.png")
    plant("duplicate", twin, image.name)
    _, label = take()
    change_png(label, lambda values: np.full_like(values, 255))
    plant("empty_mask", train / "images" / f"{label.stem}.jpg")
    image, _ = take()
    with Image.open(image) as picture:
        picture.transpose(Image.Transpose.ROTATE_180).save(image.with_suffix(".bmp"))
    plant("duplicate", image, image.with_suffix(".bmp").name)
    image, label = take()
    shutil.copyfile(image, val / "images" / "leak.jpg")
    shutil.copyfile(label, val / "labels" / "leak.png")
    plant("duplicate", val / "images" / "leak.jpg", image.name, "train")
    (train / "images" / "notes.txt").write_bytes(BROKEN_TEXT)
    plant("unlisted_file", train / "images" / "notes.txt")
    _, label = take()
    label.write_bytes(BROKEN_TEXT)
    plant("unreadable_file", label)
    return planted


# --- volumes ---------------------------------------------------------------------------------------------------------


def break_volumes(root: Path) -> list[Planted]:
    """Damage of `SPLIT/images/*.nii.gz` + `SPLIT/labels/*.nii.gz` in 15 ways."""
    import nibabel

    train, val = root / "train", root / "val"
    names = iter(sorted(file.name for file in (train / "images").iterdir()))
    planted: list[Planted] = []

    def plant(kind: str, file: Path, *words: str) -> None:
        planted.append(Planted(kind, str(file.relative_to(root)), words))

    def take() -> tuple[Path, Path]:
        name = next(names)
        return train / "images" / name, train / "labels" / name

    def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None) -> None:
        stored = nibabel.load(path)
        values = change(np.asanyarray(stored.dataobj))
        nibabel.save(nibabel.Nifti1Image(values, stored.affine if affine is None else affine), path)

    image, label = take()
    image.write_bytes(b"")
    plant("unreadable_file", image)
    image, label = take()
    cut(image)
    plant("unreadable_file", image)
    image, label = take()
    label.write_bytes(BROKEN_TEXT)
    plant("unreadable_file", label)
    image, label = take()
    rewrite(label, lambda values: values[:-2])
    plant("size_mismatch", label)
    image, label = take()
    rewrite(label, lambda values: values, affine=np.diag([1.0, 1.0, 2.5, 1.0]))
    plant("size_mismatch", label, "2.5")
    image, label = take()
    rewrite(label, lambda values: np.where(values == 2, 7, values).astype(np.uint8))
    plant("unknown_label", label, "7")
    image, label = take()
    rewrite(label, lambda values: (values * 0.5).astype(np.float32))
    plant("unknown_label", label, "0.5")
    image, label = take()
    rewrite(image, lambda values: np.where(values > values.mean(), np.nan, values).astype(np.float32))
    plant("unreadable_file", image, "nan")
    image, label = take()
    rewrite(image, lambda values: np.stack([values, values], axis=-1))
    plant("size_mismatch", image, "3 axes")
    image, label = take()
    rewrite(label, np.zeros_like)
    plant("empty_mask", label)
    image, label = take()
    for file in (image, label):
        shutil.copyfile(file, file.with_name("twin.nii.gz"))
    plant("duplicate", train / "images" / "twin.nii.gz", image.name)
    image, label = take()
    label.unlink()
    plant("missing_file", image)
    image, label = take()
    image.unlink()
    plant("missing_file", label)
    image, label = take()
    nibabel.save(nibabel.load(image), image.with_name(image.name.removesuffix(".gz")))
    plant("duplicate", image)
    image, label = take()
    shutil.copyfile(image, val / "images" / "leak.nii.gz")
    shutil.copyfile(label, val / "labels" / "leak.nii.gz")
    plant("duplicate", val / "images" / "leak.nii.gz", image.name, "train")
    (train / "images" / "notes.txt").write_bytes(BROKEN_TEXT)
    plant("unlisted_file", train / "images" / "notes.txt")
    return planted
