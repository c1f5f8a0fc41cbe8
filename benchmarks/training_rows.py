"""The rows of the training comparison in their JSON file: each is added as its run ends, whoever runs beside it."""

import fcntl
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_maskformer.evaluation.json_format import json_ready

OURS = "ours"
Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows in the order in which they ended; none without the file."""
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def finished_row(rows: list[Row], wanted: Row) -> Row | None:
    """The row of the same run: same model, learning rate, seed, conditions and training settings."""
    return next((row for row in rows if same_cell(row, wanted) and row["settings"] == wanted["settings"]), None)


def add_row(path: Path, row: Row) -> None:
    """Add a row in place of the one of the same cell.

    Several processes may add rows at once: the folder is locked meanwhile, and the file is replaced in one piece.
    """
    row = json_ready(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        replace_rows(path, [*(kept for kept in read_rows(path) if not same_cell(kept, row)), row])


def replace_rows(path: Path, rows: list[Row]) -> None:
    """Write the file in one piece; whoever reads meanwhile sees the old rows or the new ones."""
    written = path.with_name(path.name + ".tmp")
    written.write_text(json.dumps({"rows": json_ready(rows)}, indent=2) + "\n")
    os.replace(written, path)


def commit_of(root: Path) -> str:
    """The commit that a figure was made with; "+" behind it: and with changes that are in none."""
    words = ["git", "-C", str(root)]
    commit = subprocess.run([*words, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run(
        [*words, "status", "--porcelain", "--untracked-files=no", "src", "recipes"],
        capture_output=True,
        text=True,
        check=True,
    )
    return commit.stdout.strip() + ("+" if changed.stdout else "")


def digest(value: Any) -> str:
    """A short name of a JSON-ready value."""
    return hashlib.sha256(json.dumps(json_ready(value), sort_keys=True).encode()).hexdigest()[:12]


def same_cell(row: Row, other: Row) -> bool:
    """Whether one takes the other's place: ours has one learning rate, that of its recipe, a peer several."""
    names = ["model", "seed", "conditions", *(["learning_rate"] if row["model"] != OURS else [])]
    return all(row.get(name) == other.get(name) for name in names)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other process is in this block with the same folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # gives the lock back
