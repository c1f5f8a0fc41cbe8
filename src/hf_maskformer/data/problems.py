"""What can be wrong with a dataset, and what a reader does about it: stop at the first problem, or list them all.

The readers raise ordinary errors; `Problems.catch` marks the places where reading can go on after one (a segment, an
image). Loading stops there, `hf-maskformer inspect-dataset` writes the problem down and goes on.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_maskformer.model.image_conversion import UnreadableImageError

PROBLEM_KINDS = {
    "unreadable_file": "a file that is empty, damaged or of another kind than its name says",
    "missing_file": "a file that is named but does not exist, or has no partner",
    "unlisted_file": "a file that no annotation names: it is not used",
    "size_mismatch": "image, mask and annotation are not of one size",
    "unknown_label": "a class id, value or colour without a name",
    "unlisted_segment": "pixels of a segment that the annotation does not describe",
    "empty_mask": "a segment without a pixel: it is not used",
    "broken_mask": "a polygon or run-length code that describes no mask",
    "box_mismatch": "a bounding box that does not fit its mask",
    "duplicate": "an id, an image or a mask that stands twice",
    "broken_record": "an annotation file or record that lacks something or contradicts itself",
}
LOGGED_PER_KIND = 5  # warnings of one kind that are written out; the rest is counted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: a key of `PROBLEM_KINDS`.
        file: the file to look at.
        message: a sentence that names the file, the value and, where there is one, the image or annotation.
    """

    kind: str
    file: str
    message: str


class DatasetError(ValueError):
    """A problem that ends the reading of a segment, an image or the whole dataset."""

    def __init__(self, kind: str, file: str | Path, message: str) -> None:
        super().__init__(message)
        if kind not in PROBLEM_KINDS:
            raise KeyError(f"{kind!r} is no problem kind, allowed: {', '.join(PROBLEM_KINDS)}")
        self.problem = Problem(kind, str(file), message)

    def __reduce__(self) -> tuple[type["DatasetError"], tuple[str, str, str]]:
        return type(self), (self.problem.kind, self.problem.file, self.problem.message)


@contextmanager
def problem_kind(kind: str, file: str | Path) -> Iterator[None]:
    """Makes a plain ValueError raised inside a `DatasetError` of this kind and file.

    The message stays, after the file's name where it does not hold that.
    An `UnreadableImageError` becomes the kind "unreadable_file"; a `DatasetError` stays what it is.
    """
    try:
        yield
    except DatasetError:
        raise
    except UnreadableImageError as error:
        raise DatasetError("unreadable_file", file, _with_file(file, error)) from error
    except ValueError as error:
        raise DatasetError(kind, file, _with_file(file, error)) from error


def _with_file(file: str | Path, error: ValueError) -> str:
    return str(error) if str(file) in str(error) else f"{file}: {error}"


class Problems:
    """Where readers report.

    Args:
        mode: "raise": the first error is raised. "skip": as "raise", but files that cannot be read are logged and
            left out. "list": every error is kept in `found` and reading goes on.

    Attributes:
        found: all warnings, and the errors that did not stop the reading.
        left_out: one problem for each image that has no row because of it; also in `found` where it was reported.
    """

    def __init__(self, mode: Literal["raise", "skip", "list"] = "raise") -> None:
        if mode not in ("raise", "skip", "list"):
            raise ValueError(f"mode must be raise, skip or list, got {mode!r}")
        self.mode = mode
        self.found: list[Problem] = []
        self.left_out: list[Problem] = []

    def warning(self, kind: str, file: str | Path, message: str) -> None:
        """Something that does not stop the reading in any mode; `log` writes it out."""
        if kind not in PROBLEM_KINDS:
            raise KeyError(f"{kind!r} is no problem kind, allowed: {', '.join(PROBLEM_KINDS)}")
        self.found.append(Problem(kind, str(file), message))

    @contextmanager
    def catch(self, file: str | Path, kind: str = "broken_record") -> Iterator[None]:
        """Ends here what raised a ValueError inside, if the mode allows to go on; raises it otherwise.

        Args:
            file: what is being read, for errors that do not say it themselves.
            kind: of the errors that have none.
        """
        try:
            yield
        except UnreadableImageError as error:
            if self.mode == "raise":
                raise
            self.found.append(Problem("unreadable_file", str(file), str(error)))
        except DatasetError as error:
            if self.mode != "list" and not (self.mode == "skip" and error.problem.kind == "unreadable_file"):
                raise
            self.found.append(error.problem)
        except ValueError as error:
            if self.mode != "list":
                raise
            self.found.append(Problem(kind, str(file), str(error)))

    def leave_out(self, file: str | Path, since: int) -> None:
        """An image that has no row.

        Args:
            file: what is being read, named where nothing was reported.
            since: length of `found` before the image was read; the last problem after it is the reason.
        """
        unnamed = Problem("unreadable_file", str(file), f"{file}: an image is left out")
        self.left_out.append(self.found[-1] if len(self.found) > since else unnamed)

    def log(self, where: str | Path) -> None:
        """Writes what was found to the log, a few of each kind and the number of the others."""
        counts: Counter[str] = Counter()
        for problem in self.found:
            counts[problem.kind] += 1
            if counts[problem.kind] <= LOGGED_PER_KIND:
                logger.warning("%s", problem.message)
        for kind, count in counts.items():
            if count > LOGGED_PER_KIND:
                logger.warning("%s: %d more problems of the kind %s", where, count - LOGGED_PER_KIND, kind)
