"""Which files a call of predict means, and how their results are named."""

from pathlib import Path

from hf_maskformer.cli.predict import image_files, unique_names


def test_folders_are_listed_once_and_sorted(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt"):
        (tmp_path / name).touch()
    found = image_files([str(tmp_path / "b.JPG"), str(tmp_path)])
    assert [path.name for path in found] == ["b.JPG", "a.png"]


def test_images_with_the_same_stem_do_not_overwrite_each_other():
    names = unique_names([Path("x/a.png"), Path("y/a.png"), Path("b.png")])
    assert list(names.values()) == ["a", "a-2", "b"]
