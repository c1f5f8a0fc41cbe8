"""The stored index: made once, never stale, never half written, and its warnings come back each time."""

import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_maskformer.data.dataset_index import DatasetSource, files_fingerprint, indexed_dataset, readable_rows
from hf_maskformer.data.problems import DatasetError, Problems
from hf_maskformer.data.sample import FEATURES
from hf_maskformer.model.label_spec import LabelSpec

SPEC = LabelSpec({0: "cell"})
SEGMENT = {"id": 7, "label_id": 0, "iscrowd": False, "area": 2.0, "bbox": [0.0, 0.0, 1.0, 2.0], "rle": "02"}


def row(number: int) -> dict:
    image = {"bytes": None, "path": f"{number}.png"}
    segments = [SEGMENT] * number
    return {"image": image, "image_id": str(number), "height": 2, "width": 1, "file_name": "x", "segments": segments}


def source(problems: Problems, count: int = 3, runs: list | None = None, fingerprint: str = "abc") -> DatasetSource:
    def rows() -> Iterator[dict]:
        if runs is not None:
            runs.append(count)
        for number in range(count):
            problems.warning("empty_mask", "x.json", f"row {number} is odd")
            yield row(number)

    return DatasetSource(SPEC, rows, fingerprint)


def test_rows_are_made_once_and_warnings_are_logged_each_time(
    cache_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[int] = []
    for opened in (1, 2):
        problems = Problems()
        problems.warning("unlisted_file", "y.json", "found while opening")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            dataset = indexed_dataset(source(problems, runs=runs), problems, "the set", cache_dir)
        assert [dataset[index] for index in range(3)] == [row(0), row(1), row(2)]
        assert dataset.features == FEATURES
        assert runs == [3], f"opening {opened}"
        messages = ["found while opening", "row 0 is odd", "row 1 is odd", "row 2 is odd"]
        assert [problem.message for problem in problems.found] == messages
        assert [record.getMessage() for record in caplog.records] == messages
    folder = Path(dataset.cache_files[0]["filename"]).parent
    assert sorted(file.name for file in folder.iterdir()) == ["problems.json", "rows.arrow"]


def test_many_rows_and_no_row(cache_dir: str) -> None:
    problems = Problems()
    dataset = indexed_dataset(source(problems, 501), problems, "set", cache_dir)
    assert [dataset[index]["image_id"] for index in (0, 199, 200, 500)] == ["0", "199", "200", "500"]
    assert len(indexed_dataset(source(problems, 0, fingerprint="none"), problems, "set", cache_dir)) == 0


def test_the_mode_is_part_of_what_is_stored(cache_dir: str) -> None:
    runs: list[int] = []
    for mode in ("raise", "skip", "raise"):
        problems = Problems(mode)
        indexed_dataset(source(problems, runs=runs), problems, "set", cache_dir)
    assert runs == [3, 3]


def test_nothing_is_stored_when_reading_fails(cache_dir: str) -> None:
    problems = Problems()

    def rows() -> Iterator[dict]:
        yield row(1)
        raise DatasetError("unknown_label", "x.json", "no class 5")

    for _ in range(2):
        with pytest.raises(DatasetError, match="no class 5"):
            indexed_dataset(DatasetSource(SPEC, rows, "abc"), problems, "set", cache_dir)
    assert [path for path in Path(cache_dir).rglob("*") if path.is_file()] == []


def test_another_process_may_be_faster(cache_dir: str) -> None:
    problems = Problems()

    def rows() -> Iterator[dict]:
        indexed_dataset(source(Problems()), Problems(), "set", cache_dir)  # finishes while this one is at work
        yield from source(problems).rows()

    dataset = indexed_dataset(DatasetSource(SPEC, rows, "abc"), problems, "set", cache_dir)
    assert len(dataset) == 3
    assert len(list(Path(cache_dir).rglob("rows.arrow"))) == 1


def test_the_fingerprint_follows_files_and_options(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_text("1")

    def fingerprint(**options: object) -> str:
        return files_fingerprint("reader", 1, options, [*files, tmp_path / "missing"])

    first = fingerprint(x=1)
    assert fingerprint(x=1) == first
    assert fingerprint(x=2) != first
    time = files[0].stat().st_mtime_ns
    os.utime(files[0], ns=(time + 1, time + 1))
    second = fingerprint(x=1)
    assert second != first
    files[1].write_text("22")
    third = fingerprint(x=1)
    assert third not in (first, second)
    (tmp_path / "missing").write_text("")
    assert fingerprint(x=1) != third


def test_the_fingerprint_follows_links_and_the_path_that_rows_hold(tmp_path: Path) -> None:
    for folder, text in (("v1", "1"), ("v2", "22")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_text(text)
    current = tmp_path / "current"

    def fingerprint(folder: Path) -> str:
        return files_fingerprint("reader", 1, {}, [folder / "a.png"])

    current.symlink_to("v1")
    first = fingerprint(current)
    assert first != fingerprint(tmp_path / "v1"), "its rows would name files of whatever the link means later"
    current.unlink()
    current.symlink_to("v2")
    assert fingerprint(current) != first


def test_names_that_no_file_can_have_are_left_to_their_reader(tmp_path: Path) -> None:
    names = ["a" * 300, "a\0b", "\ud800", "folder\0/a"]
    empty = files_fingerprint("reader", 1, {}, [])
    assert files_fingerprint("reader", 1, {}, [tmp_path / name for name in names]) == empty


def make(number: int) -> dict | None:
    if number == 1:
        raise DatasetError("unreadable_file", "1.png", "1.png: cut off")
    if number == 2:
        raise DatasetError("size_mismatch", "2.png", "2.png: too small")
    return None if number == 3 else row(number)


@pytest.mark.parametrize(
    ("mode", "numbers", "found"),
    [
        ("list", [0, 1, 2, 3, 4], ["1.png: cut off", "2.png: too small"]),
        ("skip", [0, 1, 4], ["1.png: cut off", "set: 1 of 3 images are left out"]),
    ],
)
def test_rows_with_problems_are_left_out(mode: str, numbers: list[int], found: list[str]) -> None:
    problems = Problems(mode)
    kept = list(readable_rows(numbers, make, problems, Path("set")))
    assert [entry["image_id"] for entry in kept] == ["0", "4"]
    assert [problem.message for problem in problems.found] == found


def test_what_stops_the_reading() -> None:
    with pytest.raises(DatasetError, match="cut off"):
        list(readable_rows([0, 1], make, Problems("raise"), Path("set")))
    with pytest.raises(DatasetError, match="too small"):
        list(readable_rows([0, 2], make, Problems("skip"), Path("set")))
    with pytest.raises(ValueError, match=r"set: none of the 1 images can be read, such as 1\.png"):
        list(readable_rows([1], make, Problems("skip"), Path("set")))


def test_the_benchmark_of_indexing_reads_what_it_makes(tmp_path: Path, project_root: Path) -> None:
    """`benchmarks/indexing.py` measures the time; here its set is read whole and its figures are there."""
    spec = importlib.util.spec_from_file_location("indexing", project_root / "benchmarks" / "indexing.py")
    assert spec is not None
    assert spec.loader is not None
    indexing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(indexing)
    folder = indexing.make_coco(tmp_path, 40)
    annotations = json.loads((folder / "train" / "instances.json").read_text())["annotations"]
    times = indexing.time_indexing(folder, "train")
    assert (times["images"], times["segments"]) == (40, len(annotations))
    assert times["cached_s"] < times["cold_s"]
