"""Images by name: what is passed over, what is reported and what is an error."""

from pathlib import Path

import pytest

from hf_maskformer.data.paired_files import image_files, image_name, list_folder, report_missing
from hf_maskformer.data.problems import DatasetError, Problems


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def test_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a.png", ".hidden.png", "notes.txt")
    (tmp_path / "folder.png").mkdir()
    problems = Problems()
    assert list(image_files(tmp_path, problems).items()) == [("a", tmp_path / "a.png"), ("b", tmp_path / "b.JPG")]
    assert [(problem.kind, problem.file) for problem in problems.found] == [
        ("unlisted_file", str(tmp_path / "notes.txt"))
    ]


def test_one_name_twice(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "a.png")
    with pytest.raises(DatasetError, match=r"holds a\.jpg and a\.png: one name, two files"):
        image_files(tmp_path, Problems())
    problems = Problems("list")
    assert image_files(tmp_path, problems) == {"a": tmp_path / "a.jpg"}
    assert [problem.kind for problem in problems.found] == ["duplicate"]


def test_nothing_to_read_is_an_error_in_every_mode(tmp_path: Path) -> None:
    for mode in ("raise", "skip", "list"):
        with pytest.raises(DatasetError, match=r"holds no file that ends with \.png; it is empty"):
            image_files(tmp_path, Problems(mode), (".png",))
    touch(tmp_path, "a.gif")
    with pytest.raises(DatasetError, match=r"found 1 other file\(s\) such as a\.gif"):
        image_files(tmp_path, Problems("list"))


def test_folders_with_files_are_reported(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    touch(tmp_path / "sub" / "deep", "b.png", ".hidden")
    problems = Problems()
    assert list(image_files(tmp_path, problems)) == ["a"]
    assert [(problem.kind, problem.file) for problem in problems.found] == [("unlisted_file", str(tmp_path / "sub"))]
    assert "its 1 file(s) are not used" in problems.found[0].message
    (tmp_path / "a.png").unlink()
    with pytest.raises(DatasetError, match="found only folders such as empty"):
        image_files(tmp_path, Problems())


def test_links_count_as_what_they_lead_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    touch(tmp_path / "real", "a.png")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "b.png").symlink_to(tmp_path / "real" / "a.png")
    assert list_folder(tmp_path) == ([tmp_path / "b.png"], [tmp_path / "linked", tmp_path / "real"])
    assert list_folder(tmp_path / "nowhere") == ([], [])
    problems = Problems()
    assert list(image_files(tmp_path / "linked", problems)) == ["a"]
    assert problems.found == []


def test_the_name_of_an_image_is_its_place_below_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "train")
    assert image_name(Path("images/a.png")) == "train/images/a.png"
    assert image_name(tmp_path / "train" / "images" / "a.png") == "train/images/a.png"


def test_each_file_without_a_partner_is_reported(tmp_path: Path) -> None:
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    with pytest.raises(DatasetError, match=r"a\.png: has no label"):
        report_missing(files, "label", Problems("skip"))
    problems = Problems("list")
    report_missing(files, "label", problems)
    assert [(problem.kind, problem.file) for problem in problems.found] == [
        ("missing_file", str(file)) for file in files
    ]
