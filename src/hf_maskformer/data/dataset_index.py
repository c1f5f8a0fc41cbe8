"""Keeps the rows that a reader made on disk, and never serves them once a file has changed."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from hf_maskformer.data.sample import FEATURES
from hf_maskformer.model.image_conversion import UnreadableImageError

ON_BAD_SAMPLE = ("raise", "skip")

Source = TypeVar("Source")

logger = logging.getLogger(__name__)


def check_on_bad_sample(on_bad_sample: str) -> None:
    if on_bad_sample not in ON_BAD_SAMPLE:
        raise ValueError(f"on_bad_sample {on_bad_sample!r} is not allowed: {', '.join(ON_BAD_SAMPLE)}")


def files_fingerprint(reader: str, version: int, options: Mapping[str, Any], files: Iterable[Path]) -> str:
    """Hash of the reader, its options, and the path, size and modification time of each file."""
    digest = hashlib.sha256(json.dumps([reader, version, dict(options)], sort_keys=True, default=str).encode())
    for file in sorted(files):
        state = file.stat()
        digest.update(f"{file.resolve()}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def indexed_dataset(
    rows: Callable[[], Iterator[dict[str, Any]]], fingerprint: str, cache_dir: str | Path | None = None
) -> Dataset:
    """Runs `rows` once for each fingerprint; later calls map the stored Arrow file.

    `datasets` alone would hash the function and serve old rows after a file changed. A ValueError that `rows` raises
    reaches the caller as it is, and nothing is stored.
    """
    try:
        return Dataset.from_generator(
            rows, features=FEATURES, fingerprint=fingerprint, cache_dir=None if cache_dir is None else str(cache_dir)
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def readable_rows(
    sources: Sequence[Source], make_row: Callable[[Source], dict[str, Any]], on_bad_sample: str, where: Path
) -> Iterator[dict[str, Any]]:
    """The row of each source; with on_bad_sample "skip" those with an unreadable file are logged and left out.

    Other errors (unknown classes, sizes that differ) speak of the dataset and are raised in any case.

    Raises:
        ValueError: with "skip", if no row is left; `where` names the dataset.
    """
    left_out = 0
    for source in sources:
        try:
            row = make_row(source)
        except UnreadableImageError as error:
            if on_bad_sample == "raise":
                raise
            left_out += 1
            if left_out == len(sources):
                raise ValueError(f"{where}: none of the {left_out} images can be read, such as {error}") from error
            logger.warning("an image is left out: %s", error)
            continue
        yield row
    if left_out:
        logger.warning("%s: %d of %d images are left out", where, left_out, len(sources))


def path_image(path: Path) -> dict[str, Any]:
    """The `image` of a row whose pixels stay in their file."""
    return {"bytes": None, "path": str(path.resolve())}
