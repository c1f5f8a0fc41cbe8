"""Data sets that the library `datasets` reads: ids on the Hub, local parquet or arrow files, `save_to_disk` folders.

A mapping says which columns hold the image and its truth (`columns.py`); rows become those of every other format
(`column_rows.py`). Code of a data set is never run.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError

from hf_maskformer.data.background import needs_background
from hf_maskformer.data.column_classes import ColumnClasses
from hf_maskformer.data.column_rows import ColumnRows
from hf_maskformer.data.columns import Columns, resolve_columns
from hf_maskformer.data.dataset_index import DatasetSource, cache_folder, files_fingerprint, indexed_dataset
from hf_maskformer.data.hub_labels import LabelOptions, ProblemMode, column_classes
from hf_maskformer.data.layouts import SPLIT_NAMES
from hf_maskformer.data.problems import Problems
from hf_maskformer.data.row_stream import SHUFFLE_BUFFER, RowStream
from hf_maskformer.data.sample import TASKS, check_task
from hf_maskformer.data.segmentation_data import SegmentationData

READER_VERSION = 1
ROWS_PER_READ = 8  # raw rows in memory while the index is made
HUB_OPTIONS = (
    "columns",
    "config_name",
    "revision",
    "data_files",
    "streaming",
    "shuffle_buffer",
    "id2label",
    "thing_labels",
    "thing_label_ids",
    "ignore_index",
    "reduce_labels",
    "label_table",
    "cache_dir",
    "intensity_range",
    "on_bad_sample",
)
SAVED_SPLITS_FILE, SAVED_SPLIT_FILE = "dataset_dict.json", "state.json"  # of `save_to_disk`

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubSplit:
    """An opened split and how its rows are made."""

    dataset: Any
    rows: ColumnRows
    fingerprint: str

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks there is truth for, the default first."""
        return kind_tasks(self.rows.columns)


def load_hub(
    path_or_id: str | Path, split: str | None, task: str | None = None, options: Mapping[str, Any] | None = None
) -> SegmentationData:
    """Opens one split of a data set that `datasets` reads.

    Args:
        path_or_id: an id "owner/name" on the Hub, a folder, or with `data_files` the name of a file format
            ("parquet").
        split: its name; None where there is only one.
        task: "semantic", "instance" or "panoptic"; None = what the columns are made for.
        options: of `HUB_OPTIONS`; columns: role -> column name (see `columns.resolve_columns`), streaming: read from
            first to last without an index, on_bad_sample: "raise" or "skip" rows that cannot be read.

    Raises:
        ValueError: the data set cannot be opened, or its columns, classes or rows are not what was asked for.
    """
    options = dict(options or {})
    on_bad_sample = options.get("on_bad_sample", "raise")
    problems = Problems(on_bad_sample)
    opened = _open(path_or_id, split, task, options, problems.mode)
    task = task or opened.tasks[0]
    rows = opened.rows
    if options.get("streaming"):
        buffer = options.get("shuffle_buffer", SHUFFLE_BUFFER)
        dataset: Any = RowStream(opened.dataset, rows, rows.where, on_bad_sample, buffer)
    else:
        dataset = indexed_dataset(_source(opened, problems), problems, rows.where, options.get("cache_dir"))
    spec, left_out = rows.classes.label_spec, problems.left_out
    background = needs_background(task, opened.tasks)
    intensity_range = options.get("intensity_range")
    return SegmentationData(dataset, spec, task, "hub", split, intensity_range, left_out, background)


def hub_source(
    path_or_id: str | Path,
    split: str | None,
    options: Mapping[str, Any],
    problems: Problems,
    task: str | None = None,
) -> DatasetSource:
    """As `load_hub` for an inspection: the split, opened but not read."""
    return _source(_open(path_or_id, split, task, {**options, "streaming": False}, problems.mode), problems)


def hub_splits(
    path_or_id: str | Path, split: str | None, options: Mapping[str, Any], task: str | None = None
) -> list[str]:
    """Names of all splits, or of the one that `split` means.

    Raises:
        ValueError: as `load_hub` for all that can be seen without reading a row.
    """
    _check_options(options)
    splits = open_splits(str(path_or_id), split, {**options, "streaming": False})
    names = list(splits) if split is None else [choose_split(str(path_or_id), split, list(splits))]
    for name in names:
        _columns(splits[name], f"{path_or_id} {name}", task, options)
    return names


def kind_tasks(columns: Columns) -> tuple[str, ...]:
    """The tasks that a kind of truth serves, the default first."""
    if columns.kind == "semantic":
        return ("semantic",)
    if columns.kind == "panoptic" or (columns.kind == "instance_map" and "semantic_map" in columns.roles):
        return TASKS_OF_SCENES
    return ("instance", "semantic", "panoptic") if columns.kind == "instance_map" else ("instance", "semantic")


TASKS_OF_SCENES = ("panoptic", "instance", "semantic")


def _open(
    path_or_id: str | Path, split: str | None, task: str | None, options: Mapping[str, Any], mode: ProblemMode
) -> HubSplit:
    if task is not None:
        check_task(task, TASKS, "any format")
    _check_options(options)
    splits = open_splits(str(path_or_id), split, options)
    name = choose_split(str(path_or_id), split, list(splits))
    where = f"{path_or_id} {name}"
    raw = splits[name]
    if options.get("streaming") and raw.features is None:
        raw = raw._resolve_features()  # reads the first rows
    columns = _columns(raw, where, task, options)
    used = list(dict.fromkeys(columns.roles.values()))
    streaming = bool(options.get("streaming"))
    searched = {} if streaming else {name: other for name, other in splits.items() if set(used) <= set(other.features)}
    classes = column_classes(
        LabelOptions.from_options(options, str(path_or_id)),
        columns,
        raw.features,
        where=where,
        wants_things=(task or kind_tasks(columns)[0]) != "semantic",
        raw_splits=None
        if streaming
        else {name: partial(raw_rows, other.select_columns(used)) for name, other in searched.items()},
        fingerprint=_fingerprint(columns, options, list(searched.values())),
        cache_dir=options.get("cache_dir"),
        mode=mode,
    )
    raw = raw.select_columns(used)
    raw = raw.decode(False) if streaming else raw
    rows = ColumnRows(columns, classes, where)
    fingerprint = "" if streaming else _fingerprint(columns, {**options, "classes": _described(classes)}, [raw])
    return HubSplit(raw, rows, fingerprint)


def _columns(raw: Any, where: str, task: str | None, options: Mapping[str, Any]) -> Columns:
    """The columns to read, which have the truth for the task."""
    columns = resolve_columns(raw.features or {}, options.get("columns"), where)
    if task is not None:
        check_task(task, kind_tasks(columns), f"the columns of {where} ({columns.kind})")
    return columns


def _source(opened: HubSplit, problems: Problems) -> DatasetSource:
    def rows() -> Iterator[dict[str, Any]]:
        left_out = number = 0
        for number, raw in enumerate(raw_rows(opened.dataset), start=1):
            row, name, before = None, f"{opened.rows.where} row {number - 1}", len(problems.found)
            with problems.catch(name):
                row = opened.rows(raw, number - 1, problems)
            if row is None:
                left_out += 1
                problems.leave_out(name, before)
            else:
                yield row
        if left_out and left_out == number and problems.mode == "skip":
            reason = problems.found[-1].message
            raise ValueError(f"{opened.rows.where}: none of the {number} rows can be read, such as {reason}")

    return DatasetSource(opened.rows.classes.label_spec, rows, opened.fingerprint)


def raw_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """The rows of a `datasets.Dataset` as they are stored: images as bytes and path, classes as numbers."""
    for table in dataset.with_format("arrow").iter(batch_size=ROWS_PER_READ):
        yield from table.to_pylist()


def _fingerprint(columns: Columns, options: Mapping[str, Any], raw_splits: list[Any]) -> str:
    outside = ("cache_dir", "intensity_range", "on_bad_sample", "streaming", "shuffle_buffer")
    own = {name: value for name, value in options.items() if name not in outside}
    own |= {"columns": columns.roles, "kind": columns.kind, "data": [raw._fingerprint for raw in raw_splits]}
    return files_fingerprint("hub", READER_VERSION, own, [])


def _described(classes: ColumnClasses) -> dict[str, Any]:
    return {**classes.label_spec.to_dict(), "void": classes.void, "reduce_labels": classes.reduce_labels}


def _check_options(options: Mapping[str, Any]) -> None:
    unknown = sorted(set(options) - set(HUB_OPTIONS))
    if unknown:
        raise ValueError(f"option {unknown[0]!r} is not known for format hub, allowed: {', '.join(HUB_OPTIONS)}")
    if options.get("on_bad_sample", "raise") not in ("raise", "skip", "list"):
        raise ValueError(f"on_bad_sample {options['on_bad_sample']!r} is not allowed: raise, skip")


def choose_split(path_or_id: str, split: str | None, names: list[str]) -> str:
    """The split to read; names of one line of `SPLIT_NAMES` stand for each other, None for the only one."""
    if split is None and len(names) == 1:
        return names[0]
    if split in names:
        return str(split)
    if split is None:
        raise ValueError(f"{path_or_id} has several splits, choose one with split=: {', '.join(names)}")
    others = {alias for aliases in SPLIT_NAMES if split in aliases for alias in aliases}
    found = [name for name in names if name in others]
    if len(found) == 1:
        logger.info("%s: split %r is called %r there", path_or_id, split, found[0])
        return found[0]
    hint = "; to train without evaluation pass val_split=None (--val-split none)" if len(names) == 1 else ""
    raise ValueError(f"{path_or_id} has no split {split!r}; splits that exist: {', '.join(names)}{hint}")


def open_splits(path_or_id: str, split: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Split name -> `datasets.Dataset`, or `datasets.IterableDataset` with the option streaming.

    A split that is a slice ("train[:10%]") is the only one that is opened.
    """
    streaming = bool(options.get("streaming"))
    if _is_saved(Path(path_or_id)):
        return _saved_splits(Path(path_or_id), streaming)
    _check_cache(path_or_id, options)
    arguments: dict[str, Any] = {
        "name": options.get("config_name"),
        "revision": options.get("revision"),
        "data_files": options.get("data_files"),
        "cache_dir": None if options.get("cache_dir") is None else str(options["cache_dir"]),
        "split": split if split is not None and any(sign in split for sign in "[+") else None,
    }
    given = {name: value for name, value in arguments.items() if value is not None}
    with hub_errors(path_or_id):
        # `datasets` asks for the name of a folder, which "." has none of.
        path = os.path.abspath(path_or_id) if Path(path_or_id).is_dir() else path_or_id
        opened = datasets.load_dataset(path, streaming=streaming, **given)
    return {str(split): opened} if "split" in given else {str(name): opened[name] for name in opened}


def _is_saved(folder: Path) -> bool:
    return (folder / SAVED_SPLITS_FILE).is_file() or (folder / SAVED_SPLIT_FILE).is_file()


def _check_cache(path_or_id: str, options: Mapping[str, Any]) -> None:
    """`datasets` reads every file of a folder, so its own copies of the rows must not lie there."""
    cache = cache_folder(options.get("cache_dir")).parent.resolve()
    if options.get("data_files") is None and Path(path_or_id).is_dir():
        folder = Path(path_or_id).resolve()
        if cache.is_relative_to(folder):
            raise ValueError(
                f"cache_dir {str(cache)!r} lies in the data set {path_or_id!r}, whose files would then be read twice; "
                "choose a folder outside of it"
            )


def _saved_splits(folder: Path, streaming: bool) -> dict[str, Any]:
    """A folder written by `save_to_disk`; a single data set that knows no split is "train"."""
    with hub_errors(str(folder)):
        saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.Dataset):
        saved = {str(saved.split or "train"): saved}
    if not streaming:
        return dict(saved)
    return {name: data.to_iterable_dataset(num_shards=max(1, len(data.cache_files))) for name, data in saved.items()}


@contextmanager
def hub_errors(path_or_id: str) -> Iterator[None]:
    """Turns what `datasets` raises while it opens a data set into a ValueError that says what to do."""
    try:
        yield
    except DatasetNotFoundError as error:
        if isinstance(error.__cause__, GatedRepoError):
            hint = "it is gated: ask for access on its page on the Hub, then log in with `hf auth login`"
        else:
            hint = (
                "check the spelling (owner/name), the revision and, for a folder, its path; for a private data set "
                "log in with `hf auth login`"
            )
        raise ValueError(f"data set {path_or_id!r} is not found or not open to you ({error}); {hint}") from error
    except ConnectionError as error:
        raise ValueError(
            f"data set {path_or_id!r} cannot be fetched from the Hub ({error}); check the network and HF_HUB_OFFLINE, "
            "or download it and pass its folder"
        ) from error
    except FileNotFoundError as error:
        raise ValueError(
            f"data set {path_or_id!r} has no files that `datasets` reads ({error}); pass an id owner/name of the Hub, "
            "a folder with parquet, arrow, json or webdataset files, or one written by save_to_disk"
        ) from error
    except DatasetGenerationError as error:
        reason = error.__cause__ or error
        raise ValueError(f"data set {path_or_id!r}: its files cannot be read ({reason})") from error
    except RuntimeError as error:
        raise ValueError(
            f"data set {path_or_id!r} cannot be read without running its own code ({error}), which is never done; its "
            "parquet files may be at revision='refs/convert/parquet'"
        ) from error
    except (ValueError, OSError) as error:
        raise ValueError(f"data set {path_or_id!r}: {error}") from error
