"""What every metric of this package shares: pairwise update, merge of two states, and the bridge to `evaluate`.

A metric sees arrays only: no model, no data set, no files. `update` may be called any number of times, `compute` does
not change the state, and the state is small (counts or match records, never masks), so that it can be pickled, sent
between processes and merged.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

AnyMetric = TypeVar("AnyMetric", bound="Metric")


def to_numpy(value: Any) -> np.ndarray:
    """The array of a numpy array, a tensor on any device or a nested list."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    return np.asarray(value)


class Metric(ABC):
    """Base of the metrics: subclasses keep their state in the attributes that `reset` creates."""

    description: ClassVar[str] = ""
    settings: ClassVar[tuple[str, ...]] = ()  # constructor arguments that two metrics must share to be merged

    def __init__(self) -> None:
        self.num_images = 0
        self.reset()

    def update(self: AnyMetric, predictions: Sequence[Any], references: Sequence[Any]) -> AnyMetric:
        """Adds one prediction per reference.

        Raises:
            ValueError: the lengths differ, or an entry is not what the metric reads. The message counts images from 0
                since the last reset; entries before the bad one are counted.
        """
        if len(predictions) != len(references):
            raise ValueError(
                f"predictions and references must have one entry per image each, got {len(predictions)} predictions "
                f"and {len(references)} references"
            )
        for prediction, reference in zip(predictions, references, strict=True):
            self._add_image(prediction, reference, where=f"image {self.num_images}")
            self.num_images += 1
        return self

    def merge(self: AnyMetric, other: "Metric") -> AnyMetric:
        """Adds the state of `other` (unchanged) to this one, as if its images had been given after the own ones."""
        if type(other) is not type(self):
            raise ValueError(f"other must be a {type(self).__name__}, got {type(other).__name__}")
        for name in self.settings:
            own, given = getattr(self, name), getattr(other, name)
            if own != given:
                raise ValueError(f"other.{name} must be {own!r} as in the metric it is merged into, got {given!r}")
        self._merge_state(other)
        self.num_images += other.num_images
        return self

    def reset(self: AnyMetric) -> AnyMetric:
        """Forgets all images."""
        self.num_images = 0
        self._reset_state()
        return self

    def as_evaluate_module(self) -> Any:
        """This metric as an `evaluate.EvaluationModule`, for `evaluate.combine` and code written against `evaluate`.

        The module holds this metric, not a copy: its `compute` returns `self.compute()` and then resets, as
        `evaluate` does. Nothing is written to disk and nothing is fetched.

        Raises:
            ImportError: `evaluate` is not installed.
        """
        return _evaluate_module(self)

    @abstractmethod
    def compute(self) -> dict[str, Any]:
        """The figures of all images so far."""

    @abstractmethod
    def _add_image(self, prediction: Any, reference: Any, where: str) -> None: ...

    @abstractmethod
    def _merge_state(self, other: Any) -> None: ...

    @abstractmethod
    def _reset_state(self) -> None: ...


def check_num_labels(num_labels: int) -> None:
    if num_labels < 1:
        raise ValueError(f"num_labels must be at least 1, got {num_labels}")


def check_dilation_ratio(dilation_ratio: float) -> None:
    if not 0 < dilation_ratio <= 1:
        raise ValueError(f"dilation_ratio must be above 0 and at most 1, got {dilation_ratio}")


def semantic_map(value: Any, where: str) -> np.ndarray:
    """The (H, W) integer array of a semantic map; ValueError for any other shape or type."""
    array = to_numpy(value)
    if array.ndim != 2:
        raise ValueError(f"{where}: a semantic map must have shape (H, W), got {array.shape}")
    if array.dtype.kind not in "iu":
        raise ValueError(f"{where}: a semantic map must hold integers, got {array.dtype}")
    return array


def ratio_or_nan(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise division; nan where the denominator is 0."""
    result = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=result, where=denominator > 0)
    return result


def mean_of_known(values: np.ndarray) -> float:
    """Mean of the values that are not nan; nan where there is none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def check_labels(labels: np.ndarray, num_labels: int, where: str) -> None:
    """Raises ValueError for the first label outside 0..num_labels - 1."""
    if labels.size and (labels.min() < 0 or labels.max() >= num_labels):
        outside = labels[(labels < 0) | (labels >= num_labels)]
        raise ValueError(f"{where}: label {int(outside[0])} is outside the allowed 0..{num_labels - 1}")


def _evaluate_module(metric: Metric) -> Any:
    try:
        import datasets
        import evaluate
    except ImportError as error:
        raise ImportError("as_evaluate_module needs the package evaluate: pip install evaluate") from error

    class MetricModule(evaluate.EvaluationModule):
        """Hands batches to the metric; the Arrow cache of the base class is never opened."""

        def _info(self) -> Any:
            entry = datasets.Value("int64")  # only the names are read, by evaluate.combine
            return evaluate.EvaluationModuleInfo(
                description=metric.description,
                citation="",
                inputs_description="predictions and references: one entry per image, as in the metric's update.",
                features=datasets.Features({"predictions": entry, "references": entry}),
            )

        def _build_data_dir(self) -> str:
            return ""  # the base class would create a cache folder in the home directory

        def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
            """Adds one image."""
            # evaluate.combine hands the single entries over under the names of the batches
            metric.update([kwargs.get("predictions", prediction)], [kwargs.get("references", reference)])

        def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
            """Adds one entry per image."""
            metric.update(predictions, references)

        def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
            """The figures of all images added, the given ones included; then forgets them."""
            if predictions is not None or references is not None:
                self.add_batch(predictions=predictions, references=references)
            result = metric.compute()
            metric.reset()
            return result

    MetricModule.__name__ = type(metric).__name__
    return MetricModule()
