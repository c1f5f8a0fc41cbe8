"""Data sets read by `datasets`: where they come from, splits, caching, and bad rows."""

import io
import json
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Image
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError

from data.hub_sets import (
    HEIGHT,
    MASKS,
    NAMES,
    WIDTH,
    cell,
    masks_of,
    object_set,
    objects,
    parquet_folder,
    photo,
    png,
    semantic_map,
    semantic_set,
)
from hf_maskformer.data import hub, hub_labels
from hf_maskformer.data.hub import choose_split, hub_source, load_hub
from hf_maskformer.data.problems import Problems


def test_parquet_folders_saved_sets_and_data_files_give_the_same_rows(tmp_path):
    data = object_set(3)
    folder = parquet_folder(tmp_path / "set", shards=2, train=data, validation=object_set(1))
    DatasetDict(train=data, validation=object_set(1)).save_to_disk(str(tmp_path / "both"))
    data.save_to_disk(str(tmp_path / "one"))
    options = {"cache_dir": str(tmp_path / "cache")}
    files = {"data_files": {"train": str(folder / "data" / "train-*.parquet")}}
    loaded = [
        load_hub(folder, "train", None, options),
        load_hub(tmp_path / "both", "train", None, options),
        load_hub(tmp_path / "one", "train", None, options),
        load_hub("parquet", None, None, {**options, **files}),
    ]
    rows = [list(data.rows()) for data in loaded]
    assert len(rows[0]) == 3
    assert all(other == rows[0] for other in rows)
    assert len(load_hub(folder, "val", None, options)) == 1  # "validation" there
    assert len(load_hub(folder, "train[:2]", None, options)) == 2


def test_images_are_indexed_without_being_decoded(load_set, monkeypatch):
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("an image was decoded by datasets")

    monkeypatch.setattr(Image, "decode_example", fail)
    data = load_set(object_set(2))
    assert data.row(1)["image"]["bytes"] == png(np.full((HEIGHT, WIDTH, 3), 1, dtype=np.uint8))
    assert data.sample(1).image[0, 0].tolist() == [1, 1, 1]


def image_folder(root: Path) -> Path:
    """An imagefolder as on the Hub: image files, and metadata.jsonl with the objects of each."""
    (root / "train").mkdir(parents=True)
    lines = []
    for number in range(2):
        (root / "train" / f"{number}.png").write_bytes(photo(number)["bytes"])
        lines.append(json.dumps({"file_name": f"{number}.png", "objects": objects()}))
    (root / "train" / "metadata.jsonl").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("streaming", [False, True])
def test_files_outside_the_arrow_table_stay_where_they_are(tmp_path, streaming):
    folder = image_folder(tmp_path / "set")
    options = {"id2label": ["cat", "dog"], "cache_dir": str(tmp_path / "cache"), "streaming": streaming}
    data = load_hub(folder, "train", None, options)
    rows = list(data.rows())
    assert [row["image"] for row in rows] == [
        {"bytes": None, "path": str(folder / "train" / f"{number}.png")} for number in range(2)
    ]
    assert data.row_image(rows[1])[0, 0].tolist() == [1, 1, 1]
    np.testing.assert_array_equal(masks_of(rows[1]), MASKS)
    (folder / "train" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1\.png: no such image file"):
        data.row_image(rows[1])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_webdataset_is_read(tmp_path, streaming):
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "train-0.tar", "w") as archive:
        for number in range(2):
            for ending, content in (("jpg", photo(number)["bytes"]), ("seg.png", png(semantic_map(number)))):
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    options = {"id2label": NAMES, "cache_dir": str(tmp_path / "cache"), "streaming": streaming}
    data = load_hub(tmp_path / "set", "train", None, options)
    for number, (_, reference) in enumerate(data.samples_with_references()):
        np.testing.assert_array_equal(reference, semantic_map(number))
    assert number == 1


def test_the_index_is_used_again_and_made_anew_when_data_or_options_change(tmp_path, monkeypatch):
    made = []
    original = hub.ColumnRows.__call__
    monkeypatch.setattr(hub.ColumnRows, "__call__", lambda *a: made.append(1) or original(*a))
    options = {"cache_dir": str(tmp_path / "cache"), "id2label": NAMES}
    folder = parquet_folder(tmp_path / "set", train=semantic_set(2))
    for expected in (2, 0):
        made.clear()
        load_hub(folder, "train", None, options)
        assert len(made) == expected
    made.clear()
    load_hub(folder, "train", None, {**options, "id2label": {0: "road", 1: "bus"}})
    assert len(made) == 2
    semantic_set(3).to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    assert len(load_hub(folder, "train", None, options)) == 3


@pytest.fixture
def opened_with(monkeypatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Replaces `load_dataset`; what it is called with."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def load_dataset(*arguments: Any, **keywords: Any) -> DatasetDict:
        calls.append((arguments, keywords))
        return DatasetDict(train=semantic_set())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_what_an_id_of_the_hub_passes_on(opened_with, tmp_path):
    options = {"config_name": "full", "revision": "abc", "cache_dir": tmp_path, "id2label": NAMES}
    data = load_hub("owner/name", "train", None, options)
    assert opened_with == [
        (("owner/name",), {"streaming": False, "name": "full", "revision": "abc", "cache_dir": str(tmp_path)})
    ]
    assert data.row(0)["file_name"] == "0.png"


def test_the_id2label_file_of_a_hub_repository_is_used_where_there_is_one(opened_with, monkeypatch, tmp_path, caplog):
    names = tmp_path / "id2label.json"
    names.write_text(json.dumps({"0": "road", "1": "car"}))
    asked = []

    def download(repo_id: str, filename: str, **keywords: Any) -> str:
        asked.append((repo_id, filename, keywords))
        return str(names)

    monkeypatch.setattr(hub_labels, "hf_hub_download", download)
    options = {"cache_dir": tmp_path, "revision": "abc"}
    assert load_hub("owner/name", "train", None, options).label_spec.id2label == NAMES
    assert asked == [("owner/name", "id2label.json", {"repo_type": "dataset", "revision": "abc"})]

    def absent(*arguments: Any, **keywords: Any) -> str:
        raise EntryNotFoundError("404")

    monkeypatch.setattr(hub_labels, "hf_hub_download", absent)
    with caplog.at_level(logging.INFO, logger="hf_maskformer"):
        assert load_hub("owner/name", "train", None, options).label_spec.id2label[0] == "label_0"
    assert "no id2label.json is used (EntryNotFoundError)" in caplog.text

    def broken(*arguments: Any, **keywords: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(hub_labels, "hf_hub_download", broken)
    with caplog.at_level(logging.WARNING):
        load_hub("owner/name", "train", None, options)
    assert "its id2label.json cannot be fetched: no route to host" in caplog.text


def raised_by_the_hub(error: Exception, cause: Exception | None = None) -> Callable[..., None]:
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise error from cause

    return fail


@pytest.mark.parametrize(
    ("error", "cause", "message"),
    [
        (DatasetNotFoundError("doesn't exist"), None, r"'owner/name' is not found .*; check the spelling"),
        (DatasetNotFoundError("is gated"), GatedRepoError.__new__(GatedRepoError), "ask for access on its page"),
        (ConnectionError("offline"), None, "cannot be fetched from the Hub .* check the network and HF_HUB_OFFLINE"),
        (
            RuntimeError("scripts are no longer supported"),
            None,
            "without running its own code",
        ),
        (ValueError("BuilderConfig 'x' not found"), None, "data set 'owner/name': BuilderConfig 'x' not found"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(monkeypatch, error, cause, message):
    monkeypatch.setattr(datasets, "load_dataset", raised_by_the_hub(error, cause))
    with pytest.raises(ValueError, match=message):
        load_hub("owner/name", "train")


def test_offline_ids_and_folders_without_data_are_named(tmp_path):
    with pytest.raises(ValueError, match="data set 'nobody/nothing' cannot be fetched from the Hub"):
        load_hub("nobody/nothing", "train")  # the tests run offline
    with pytest.raises(ValueError, match="has no files that `datasets` reads"):
        load_hub(tmp_path, "train")
    broken = parquet_folder(tmp_path / "set", train=semantic_set())
    (broken / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 this is none")
    with pytest.raises(ValueError, match=r"data set '.*set'"):
        load_hub(broken, "train", None, {"cache_dir": str(tmp_path / "cache")})


def test_splits_are_chosen_by_name_or_alias():
    assert choose_split("set", None, ["train"]) == "train"
    assert choose_split("set", "validation", ["train", "val"]) == "val"
    with pytest.raises(ValueError, match="set has several splits, choose one with split=: train, test"):
        choose_split("set", None, ["train", "test"])
    with pytest.raises(ValueError, match=r"set has no split 'val'; splits that exist: train, test$"):
        choose_split("set", "val", ["train", "test"])


@pytest.mark.parametrize(("split", "name"), [("val", "validation"), ("valid", "val"), ("train", "training")])
def test_splits_have_the_names_that_folders_have_too(split, name):
    assert choose_split("set", split, [name, "other"]) == name
    assert choose_split("set", name, [split, "other"]) == split


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_set_that_knows_no_split_is_the_training_split_only(tmp_path, streaming):
    semantic_set(1).save_to_disk(str(tmp_path / "one"))
    options = {"cache_dir": str(tmp_path / "cache"), "id2label": NAMES, "streaming": streaming}
    for split in (None, "train"):
        assert len(list(load_hub(tmp_path / "one", split, None, options).rows())) == 1
    for split in ("val", "nonsense"):
        message = f"has no split '{split}'; splits that exist: train; to train without evaluation pass val_split=None"
        with pytest.raises(ValueError, match=message):
            load_hub(tmp_path / "one", split, None, options)


def test_a_cache_inside_the_data_is_refused(tmp_path, monkeypatch):
    """`datasets` would read its own copies as further data."""
    folder = parquet_folder(tmp_path / "set", train=semantic_set(2))
    monkeypatch.chdir(folder)
    for path in (folder, "."):
        with pytest.raises(ValueError, match=r"cache_dir '.*set/cache' lies in the data set"):
            load_hub(path, "train", None, {"cache_dir": "cache", "id2label": NAMES})
    files = {"data_files": {"train": "data/train-*.parquet"}}
    for _ in range(2):
        assert len(load_hub(".", "train", None, {**files, "cache_dir": "cache", "id2label": NAMES})) == 2


# --- bad rows --------------------------------------------------------------------------------------------------------


def with_row(bad: dict[str, Any]) -> Dataset:
    """A good row, then a bad one."""
    data = semantic_set(1)
    rows = [
        {"image": photo(), "label": cell(semantic_map())},
        {"image": photo(1), "label": cell(semantic_map()), **bad},
    ]
    return Dataset.from_list(rows, features=data.features)


BAD_ROWS = {
    "undecodable image": ({"image": {"bytes": b"none", "path": "x.png"}}, "unreadable_file", r"row 1 \(image\)"),
    "undecodable map": ({"label": {"bytes": png(semantic_map())[:40], "path": None}}, "unreadable_file", r"\(label\)"),
    "no image": ({"image": None}, "missing_file", r"row 1 \(image\): holds no image"),
    "unknown class": ({"label": cell(semantic_map() * 0 + 7)}, "unknown_label", r"row 1 \(label\): label 7 is not in"),
    "another size": ({"label": cell(semantic_map()[:4])}, "size_mismatch", r"row 1 \(label\) is 8x4 .* is 8x6"),
}


@pytest.mark.parametrize("name", list(BAD_ROWS))
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_are_raised_and_unreadable_ones_skipped(load_set, name, streaming, caplog):
    bad, kind, message = BAD_ROWS[name]
    options = {"id2label": NAMES, "streaming": streaming}
    with pytest.raises(ValueError, match=message):
        list(load_set(with_row(bad), **options).rows())
    if kind == "unreadable_file":
        with caplog.at_level(logging.WARNING):
            rows = list(load_set(with_row(bad), **options, on_bad_sample="skip").rows())
        assert [row["file_name"] for row in rows] == ["0.png"]
        assert "row 1" in caplog.text
    else:
        with pytest.raises(ValueError, match=message):
            list(load_set(with_row(bad), **options, on_bad_sample="skip").rows())


@pytest.mark.parametrize("name", list(BAD_ROWS))
def test_bad_rows_are_listed_and_reading_goes_on(tmp_path, name):
    bad, kind, _ = BAD_ROWS[name]
    with_row(bad).save_to_disk(str(tmp_path / "set"))
    problems = Problems("list")
    source = hub_source(tmp_path / "set", None, {"id2label": NAMES}, problems)
    rows = list(source.rows())
    assert rows[0]["file_name"] == "0.png"
    assert [problem.kind for problem in problems.found] == [kind]
    assert "row 1" in problems.found[0].file
    # Only the pixels of an unknown class are void, the row stays.
    assert len(rows) == (2 if name == "unknown class" else 1)


def test_nothing_but_unreadable_rows_is_an_error(load_set):
    bad = Dataset.from_list(
        [{"image": {"bytes": b"none", "path": None}, "label": cell(semantic_map())}], features=semantic_set().features
    )
    for streaming in (False, True):
        with pytest.raises(ValueError, match="none of the 1 rows can be read"):
            list(load_set(bad, id2label=NAMES, streaming=streaming, on_bad_sample="skip").rows())
