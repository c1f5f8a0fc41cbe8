"""Keeps the rows that a reader made on disk, and never serves them once a file has changed."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from hf_maskformer.data.sample import FEATURES


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


def path_image(path: Path) -> dict[str, Any]:
    """The `image` of a row whose pixels stay in their file."""
    return {"bytes": None, "path": str(path.resolve())}
