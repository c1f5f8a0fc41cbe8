"""Overlapping stages: order, limits, errors and the end of the threads."""

import threading
import time

import pytest

from hf_maskformer.inference.overlap import overlapped


def test_results_are_those_of_a_loop():
    items = overlapped(range(50), [lambda x: x + 1, lambda x: x * 10], queue_size=2, drop=False)
    assert list(items) == [(x + 1) * 10 for x in range(50)]
    assert list(overlapped([], [str], queue_size=1, drop=False)) == []


def test_no_more_items_are_read_than_may_wait():
    read = []

    def items():
        for index in range(100):
            read.append(index)
            yield index

    stream = overlapped(items(), [lambda x: x], queue_size=2, drop=False)
    assert next(stream) == 0
    time.sleep(0.3)
    # 2 before the stage, 2 behind it, one in the hands of each of source, stage and caller
    assert len(read) <= 8
    stream.close()


def test_stages_work_at_the_same_time():
    """Each stage waits for the other to have begun its next item: one after the other would never end."""
    meeting = threading.Barrier(2, timeout=10)

    def met(item):
        meeting.wait()
        return item

    first = True

    def second(item):
        nonlocal first
        if not first:
            return item
        first = False
        return met(item)

    assert list(overlapped([1, 2], [lambda x: met(x) if x == 2 else x, second], queue_size=1, drop=False)) == [1, 2]


def test_an_error_comes_after_the_results_before_it():
    def stage(item):
        if item == 3:
            raise ValueError("item 3 is broken")
        return item

    stream = overlapped(range(9), [stage, str], queue_size=4, drop=False)
    assert [next(stream), next(stream), next(stream)] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="item 3 is broken"):
        next(stream)


def test_an_error_of_the_source_comes_too():
    def items():
        yield 1
        raise OSError("camera unplugged")

    stream = overlapped(items(), [str], queue_size=1, drop=False)
    assert next(stream) == "1"
    with pytest.raises(OSError, match="camera unplugged"):
        next(stream)


def test_closing_ends_the_threads():
    before = threading.active_count()
    stream = overlapped(iter(int, 1), [lambda x: x], queue_size=1, drop=False)  # endless zeros
    assert next(stream) == 0
    stream.close()
    assert threading.active_count() == before


def test_dropping_forgets_the_oldest():
    """While the stage holds item 0, items 1 to 9 arrive: the last two of them are left."""
    arrived, held = threading.Event(), threading.Event()

    def items():
        yield 0
        held.wait(10)
        yield from range(1, 10)
        arrived.set()

    def stage(item):
        if item == 0:
            held.set()
            arrived.wait(10)
        return item

    found = list(overlapped(items(), [stage], queue_size=2, drop=True))
    assert found[0] == 0
    assert found[1:] == [8, 9]
