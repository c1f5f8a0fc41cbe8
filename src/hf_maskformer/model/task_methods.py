"""Methods of the image processor that exist for some tasks only."""

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any


class _HiddenForTasks:
    """A method that `hasattr` does not find when the processor has one of the tasks.

    This is the only thing that transformers' image-segmentation pipeline looks at to choose how to read the outputs.
    """

    def __init__(self, function: Callable[..., Any], tasks: Sequence[str]) -> None:
        self.function = function
        self.tasks = tasks
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self.function
        if instance.task in self.tasks:
            raise AttributeError(
                f"{self.function.__name__} is not offered because processor.task is {instance.task!r}; "
                "set processor.task to another task, or to None for all methods"
            )
        return MethodType(self.function, instance)


def hidden_for_tasks(*tasks: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: hide the method from instances whose `task` is one of the tasks."""
    return lambda function: _HiddenForTasks(function, tasks)
