"""What is raised, left out and listed in each mode, and what the log says."""

import logging
import pickle

import pytest

from hf_maskformer.data.problems import DatasetError, Problem, Problems, problem_kind
from hf_maskformer.model.image_conversion import UnreadableImageError

ERRORS = {
    "unreadable": UnreadableImageError("a.png: cut off"),
    "unreadable label": DatasetError("unreadable_file", "b.png", "b.png: cut off"),
    "kind": DatasetError("unknown_label", "c.json", "c.json: no class 5"),
    "plain": ValueError("something is wrong"),
}


@pytest.mark.parametrize(
    ("mode", "kept"),
    [("raise", ()), ("skip", ("unreadable", "unreadable label")), ("list", tuple(ERRORS))],
)
def test_modes_decide_what_is_raised(mode: str, kept: tuple[str, ...]) -> None:
    for name, error in ERRORS.items():
        problems = Problems(mode)
        if name in kept:
            with problems.catch("x.json", "broken_record"):
                raise error
            assert len(problems.found) == 1
        else:
            with pytest.raises(ValueError, match=str(error)), problems.catch("x.json"):
                raise error
            assert problems.found == []


def test_listed_errors_have_a_kind_and_a_file() -> None:
    problems = Problems("list")
    for error in ERRORS.values():
        with problems.catch("x.json", "broken_mask"):
            raise error
    problems.warning("box_mismatch", "y.json", "far off")
    assert problems.found == [
        Problem("unreadable_file", "x.json", "a.png: cut off"),
        Problem("unreadable_file", "b.png", "b.png: cut off"),
        Problem("unknown_label", "c.json", "c.json: no class 5"),
        Problem("broken_mask", "x.json", "something is wrong"),
        Problem("box_mismatch", "y.json", "far off"),
    ]


def test_other_errors_are_never_swallowed() -> None:
    with pytest.raises(ZeroDivisionError), Problems("list").catch("x"):
        1 / 0  # noqa: B018


def test_problem_kind_names_the_file_of_plain_errors_only() -> None:
    for error, expected in (
        (ValueError("v"), Problem("size_mismatch", "f.png", "f.png: v")),
        (ValueError("no f.png"), Problem("size_mismatch", "f.png", "no f.png")),
        (UnreadableImageError("u"), Problem("unreadable_file", "f.png", "f.png: u")),
        (DatasetError("duplicate", "g.png", "d"), Problem("duplicate", "g.png", "d")),
    ):
        with pytest.raises(DatasetError) as raised, problem_kind("size_mismatch", "f.png"):
            raise error
        assert raised.value.problem == expected


def test_unknown_kinds_and_modes_are_refused() -> None:
    with pytest.raises(KeyError, match="no problem kind"):
        DatasetError("odd", "f", "m")
    with pytest.raises(KeyError, match="no problem kind"):
        Problems().warning("odd", "f", "m")
    with pytest.raises(ValueError, match="mode must be raise, skip or list, got 'ignore'"):
        Problems("ignore")  # type: ignore[arg-type]


def test_an_error_survives_between_processes() -> None:
    error = DatasetError("duplicate", "g.png", "twice")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.problem) == ("twice", error.problem)


def test_the_log_shows_five_of_a_kind_and_counts_the_others(caplog: pytest.LogCaptureFixture) -> None:
    problems = Problems()
    for number in range(8):
        problems.warning("unlisted_file", "f", f"file {number}")
    problems.warning("empty_mask", "f", "no pixel")
    with caplog.at_level(logging.WARNING):
        problems.log("the dataset")
    assert [record.getMessage() for record in caplog.records] == [
        *(f"file {number}" for number in range(5)),
        "no pixel",
        "the dataset: 3 more problems of the kind unlisted_file",
    ]
