"""Rows read from first to last, without an index on disk; nothing is kept, so memory does not grow with the data."""

import copy
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import get_worker_info

from hf_maskformer.data.dataset_index import check_on_bad_sample
from hf_maskformer.data.problems import LOGGED_PER_KIND, Problem, Problems

ROWS_PER_READ = 8  # raw rows that are taken from a shard at once
SHUFFLE_BUFFER = 256  # rows; their images are still compressed, so this is some 50 MB of photographs

logger = logging.getLogger(__name__)

MakeRow = Callable[[Mapping[str, Any], int | str, Problems], dict[str, Any] | None]


class RowStream:
    """Rows of `sample.FEATURES`, made one by one from a `datasets.IterableDataset`.

    In the workers of a DataLoader each worker gives its own part of the rows.

    Args:
        dataset: raw rows with undecoded images.
        make_row: (raw row, its number, problems) -> row, or None where a problem leaves no row. Rows of a shuffled
            stream are named "2 of shard 1" instead, both counted from 0.
        where: the dataset, for messages.
        on_bad_sample: "raise" for rows that cannot be read, or "skip": log them and go on.
        shuffle_buffer: rows that `shuffled` draws from.
    """

    def __init__(
        self,
        dataset: Any,
        make_row: MakeRow,
        where: str,
        on_bad_sample: str = "raise",
        shuffle_buffer: int = SHUFFLE_BUFFER,
    ) -> None:
        check_on_bad_sample(on_bad_sample)
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer is {shuffle_buffer}; it must be at least 1")
        self.dataset = dataset
        self.make_row = make_row
        self.where = where
        self.on_bad_sample = on_bad_sample
        self.shuffle_buffer = shuffle_buffer
        self._is_named = False  # whether `dataset` holds {"name", "raw"} instead of raw rows
        self._is_part = False  # whether other processes read the other rows

    @property
    def num_shards(self) -> int:
        """Into how many readers the rows can be divided."""
        return int(self.dataset.num_shards)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Raises ValueError for a row that cannot be read or, with "skip", if no row of the whole data set can.

        One of several readers that can read none of its own rows only logs that.
        """
        counts: Counter[str] = Counter()
        left_out = total = 0
        for name, raw in self._raw_rows():
            total += 1
            problems = Problems("skip" if self.on_bad_sample == "skip" else "raise")
            row = None
            with problems.catch(f"{self.where} row {name}"):
                row = self.make_row(raw, name, problems)
            _log_first(problems.found, counts)
            if row is None:
                left_out += 1
            else:
                yield row
        if left_out and left_out == total:
            message = f"{self.where}: none of the {total} rows can be read; the log names the reasons"
            if not self._is_part and get_worker_info() is None:
                raise ValueError(message)
            logger.warning("one of several readers of %s", message)
        for kind, count in counts.items():
            if count > LOGGED_PER_KIND:
                logger.warning("%s: %d more problems of the kind %s", self.where, count - LOGGED_PER_KIND, kind)

    def _raw_rows(self) -> Iterator[tuple[int | str, Mapping[str, Any]]]:
        """Each raw row with its number or name."""
        if not self._is_named:
            yield from enumerate(self.dataset)
            return
        for item in self.dataset:
            yield item["name"], item["raw"]

    def shuffled(self, seed: int, epoch: int, rank: int = 0, world_size: int = 1) -> "RowStream":
        """The rows of one process in another order for each epoch: files in random order, rows drawn from a buffer.

        The processes must use the same seed, epoch and number of DataLoader workers; then each row comes to exactly
        one of them.
        """
        shards = {"dataset": self.dataset, "shards": list(range(self.num_shards))}
        dataset = IterableDataset.from_generator(_named_rows, gen_kwargs=shards)
        dataset = dataset.shuffle(seed=seed, buffer_size=self.shuffle_buffer, **_one_file_at_a_time(dataset))
        if world_size > 1:
            dataset = split_dataset_by_node(dataset, rank=rank, world_size=world_size)
        dataset.set_epoch(epoch)
        part = copy.copy(self)
        part.dataset, part._is_named, part._is_part = dataset, True, world_size > 1
        return part


def _named_rows(dataset: Any, shards: list[int]) -> Iterator[dict[str, Any]]:
    """The raw rows of some shards, each with a name that no order and no number of readers changes.

    `datasets` divides and shuffles the list of shards as it would do with the files themselves.
    """
    for shard in shards:
        number = 0
        # Not by `for`, which would divide the one shard among the readers once more.
        for batch in dataset.shard(dataset.num_shards, shard).iter(ROWS_PER_READ):
            for cells in zip(*batch.values(), strict=True):
                yield {"name": f"{number} of shard {shard}", "raw": dict(zip(batch, cells, strict=True))}
                number += 1


def _one_file_at_a_time(dataset: Any) -> dict[str, int]:
    """datasets >= 5.2 would read ten files at once, with ten times the memory and a pause of 5 s at their end."""
    name = "max_buffer_input_shards"
    return {name: 1} if name in inspect.signature(dataset.shuffle).parameters else {}


def _log_first(found: list[Problem], counts: Counter[str]) -> None:
    for problem in found:
        counts[problem.kind] += 1
        if counts[problem.kind] <= LOGGED_PER_KIND:
            logger.warning("%s", problem.message)
