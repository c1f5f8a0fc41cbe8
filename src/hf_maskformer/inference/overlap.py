"""Stages of a pipeline that work at the same time, each in a thread, on items that stay in their order."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

WAIT_SECONDS = 0.1  # after which a waiting thread looks whether it is still wanted


class _End:
    """Behind the last item: nothing, or the error that ended the stage."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def overlapped(
    items: Iterable[Any], stages: Iterable[Callable[[Any], Any]], *, queue_size: int, drop: bool
) -> Iterator[Any]:
    """`items` through all stages, in order; while the caller works on one, the stages work on the next.

    At most `queue_size` items wait before each stage and before the caller, however many there are. An error of a
    stage (or of the items) is raised here after everything before it was yielded. The threads end with the iterator,
    also when it is closed early.

    Args:
        items: read in a thread of its own.
        stages: functions of one item, each run in a thread of its own.
        queue_size: at least 1.
        drop: where the first stage is behind, forget the oldest item that waits for it; else `items` waits.
    """
    stopped = threading.Event()
    waiting: queue.Queue[Any] = queue.Queue(queue_size)
    threads = [threading.Thread(target=_feed, args=(items, waiting, stopped, drop), daemon=True)]
    for stage in stages:
        done: queue.Queue[Any] = queue.Queue(queue_size)
        threads.append(threading.Thread(target=_work, args=(stage, waiting, done, stopped), daemon=True))
        waiting = done
    for thread in threads:
        thread.start()
    try:
        while not isinstance(item := _take(waiting, stopped), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


def _feed(items: Iterable[Any], target: queue.Queue[Any], stopped: threading.Event, drop: bool) -> None:
    end = _End()
    try:
        for item in items:
            if stopped.is_set():
                return
            if drop:
                _put_newest(target, item)
            else:
                _put(target, item, stopped)
    except BaseException as error:  # raised again where the caller waits
        end = _End(error)
    _put(target, end, stopped)


def _work(
    stage: Callable[[Any], Any], source: queue.Queue[Any], target: queue.Queue[Any], stopped: threading.Event
) -> None:
    while not isinstance(item := _take(source, stopped), _End):
        try:
            result = stage(item)
        except BaseException as error:  # raised again where the caller waits
            item = _End(error)
            break
        _put(target, result, stopped)
    _put(target, item, stopped)


def _take(source: queue.Queue[Any], stopped: threading.Event) -> Any:
    while not stopped.is_set():
        try:
            return source.get(timeout=WAIT_SECONDS)
        except queue.Empty:
            continue
    return _End()


def _put(target: queue.Queue[Any], item: Any, stopped: threading.Event) -> None:
    while not stopped.is_set():
        try:
            return target.put(item, timeout=WAIT_SECONDS)
        except queue.Full:
            continue


def _put_newest(target: queue.Queue[Any], item: Any) -> None:
    """Only one thread puts, so that after a removal there is room."""
    try:
        target.put_nowait(item)
    except queue.Full:
        with contextlib.suppress(queue.Empty):  # taken meanwhile
            target.get_nowait()
        target.put_nowait(item)
