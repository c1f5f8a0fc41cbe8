"""Keeps the rows that a reader made on disk, and never serves them once a file has changed."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset
from datasets import config as datasets_config
from datasets.arrow_writer import ArrowWriter
from datasets.table import InMemoryTable

from hf_maskformer.data.problems import Problem, Problems
from hf_maskformer.data.sample import FEATURES
from hf_maskformer.model.label_spec import LabelSpec

INDEX_VERSION = 2
ON_BAD_SAMPLE = ("raise", "skip")
ROWS_PER_BATCH = 200  # rows held in memory until they are written
ROWS_FILE, PROBLEMS_FILE = "rows.arrow", "problems.json"

Source = TypeVar("Source")


@dataclass(frozen=True)
class DatasetSource:
    """One split of a dataset, opened but not yet read.

    Attributes:
        label_spec: what the label ids of the rows mean.
        rows: reads the files and gives rows of `FEATURES`, reporting to the `Problems` the source was opened with.
        fingerprint: changes with every file that is read and every option that changes a row.
    """

    label_spec: LabelSpec
    rows: Callable[[], Iterator[dict[str, Any]]]
    fingerprint: str


def check_on_bad_sample(on_bad_sample: str) -> None:
    if on_bad_sample not in ON_BAD_SAMPLE:
        raise ValueError(f"on_bad_sample {on_bad_sample!r} is not allowed: {', '.join(ON_BAD_SAMPLE)}")


def files_fingerprint(reader: str, version: int, options: Mapping[str, Any], files: Iterable[Path]) -> str:
    """Hash of the reader, its options, and the path, size and modification time of each file that exists.

    A path counts as it is given, for it stands in the rows, and with its links resolved, for a link may be moved.
    The parts of the options that are no JSON are written as text.
    """
    content = [INDEX_VERSION, reader, version, dict(options)]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
    resolved: dict[str, str] = {}  # folders: resolving each file alone would ask the disk for every part of its path
    for name in sorted(map(str, files)):
        folder, base = os.path.split(name)
        try:
            if folder not in resolved:
                resolved[folder] = f"{os.path.abspath(folder)}\0{os.path.realpath(folder)}"
            state = os.stat(name)
        except (OSError, ValueError):  # it does not exist, or no file can have this name: its reader will say so
            continue
        line = f"{resolved[folder]}\0{base}\0{state.st_size}\0{state.st_mtime_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Where indexes are stored; None = in the cache of `datasets`."""
    return Path(cache_dir if cache_dir is not None else datasets_config.HF_DATASETS_CACHE) / "hf_maskformer"


def indexed_dataset(
    source: DatasetSource, problems: Problems, where: str | Path, cache_dir: str | Path | None = None
) -> Dataset:
    """Runs `source.rows` once for each fingerprint and stores the rows; later calls map the stored Arrow file.

    The problems found while the rows were made are stored beside them, and which of them left an image out. They are
    added to `problems` and logged each time the index is opened. An error that `rows` raises reaches the caller as it
    is, and nothing is stored.

    Args:
        source: what a reader opened.
        problems: the object the source was opened with; its mode is part of what is stored.
        where: the dataset, for the log.
        cache_dir: where the index is stored; None = the cache of `datasets`.
    """
    folder = cache_folder(cache_dir) / f"{source.fingerprint}-{problems.mode}"
    if (folder / ROWS_FILE).is_file():
        stored = json.loads((folder / PROBLEMS_FILE).read_text(encoding="utf-8"))
        problems.found.extend(Problem(**fields) for fields in stored["found"])
        problems.left_out.extend(Problem(**fields) for fields in stored["left_out"])
    else:
        _store(source, problems, folder)
    problems.log(where)
    return Dataset.from_file(str(folder / ROWS_FILE))


def _store(source: DatasetSource, problems: Problems, folder: Path) -> None:
    """Writes the index beside its place and moves it there when it is complete, so no half of one is ever read."""
    building = folder.with_name(f"building-{uuid.uuid4().hex}")
    building.mkdir(parents=True)
    found, left_out = len(problems.found), len(problems.left_out)
    try:
        _write_rows(source.rows(), building / ROWS_FILE)
        stored = {
            "found": [asdict(problem) for problem in problems.found[found:]],
            "left_out": [asdict(problem) for problem in problems.left_out[left_out:]],
        }
        (building / PROBLEMS_FILE).write_text(json.dumps(stored, indent=1), encoding="utf-8")
        if not folder.exists():  # another process may have been faster; its rows are the same
            building.rename(folder)
    except OSError:
        if not (folder / ROWS_FILE).is_file():
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_rows(rows: Iterator[dict[str, Any]], path: Path) -> None:
    with ArrowWriter(path=str(path), features=FEATURES) as writer:
        while batch := list(islice(rows, ROWS_PER_BATCH)):
            writer.write_table(InMemoryTable.from_pylist(batch, schema=FEATURES.arrow_schema).table)
        writer.finalize()


def readable_rows(
    sources: Sequence[Source], make_row: Callable[[Source], dict[str, Any] | None], problems: Problems, where: Path
) -> Iterator[dict[str, Any]]:
    """The row of each source, without those that `make_row` raised for where `problems` goes on, or that are None.

    Args:
        sources: what a row is made from.
        make_row: the row; None where a problem was reported that leaves no row.
        problems: what it does with an error of `make_row`.
        where: the dataset, named for errors that name no file.

    Raises:
        ValueError: in mode "skip", if no row is left.
    """
    left_out = 0
    for source in sources:
        row = None
        before = len(problems.found)
        with problems.catch(where):
            row = make_row(source)
        if row is not None:
            yield row
            continue
        left_out += 1
        problems.leave_out(where, before)
    if left_out and problems.mode == "skip":
        if left_out == len(sources):
            reason = problems.found[-1].message
            raise ValueError(f"{where}: none of the {left_out} images can be read, such as {reason}")
        message = f"{where}: {left_out} of {len(sources)} images are left out"
        problems.warning("unreadable_file", where, message)


def path_image(path: Path) -> dict[str, Any]:
    """The `image` of a row whose pixels stay in their file."""
    return {"bytes": None, "path": os.path.abspath(path)}
