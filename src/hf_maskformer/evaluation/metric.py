"""What every metric of this package shares: pairwise update, merge of two states, and the bridge to `evaluate`.

A metric sees arrays only: no model, no data set, no files. `update` may be called any number of times, `compute` does
not change the state, and the state is small (counts or match records, never masks), so that it can be pickled, sent
between processes and merged.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

AnyMetric = TypeVar("AnyMetric", bound="Metric")


def to_numpy(value: Any) -> np.ndarray:
    """The array of a numpy array, a tensor on any device or a nested list; bfloat16, which numpy lacks, as float32."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)


def read_array(value: Any, where: str) -> np.ndarray:
    """As `to_numpy`, with a ValueError that begins with `where` for what is no array."""
    try:
        return to_numpy(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} cannot be read as an array: {error}") from error


def field(entry: Any, key: str, where: str) -> Any:
    """The value of a key that an entry of `update` must have; ValueError where it is missing or None."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: must be a dict with {key}, got {type(entry).__name__}")
    if entry.get(key) is None:
        found = "is None" if key in entry else f"is missing, the entry has only {list(entry)}"
        raise ValueError(f"{where}: {key} {found}")
    return entry[key]


def count_entries(values: Any, name: str) -> int:
    """The length of a list, an array or a tensor; ValueError for what has none, a generator say, and for a dict."""
    try:
        length = len(values)
    except TypeError:
        length = -1
    if length < 0 or isinstance(values, Mapping):
        raise ValueError(f"{name} must be a list, an array or a tensor, got {type(values).__name__}")
    return length


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
        found, expected = count_entries(predictions, "predictions"), count_entries(references, "references")
        if found != expected:
            raise ValueError(
                f"predictions and references must have one entry per image each, got {found} predictions "
                f"and {expected} references"
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
        `evaluate` does. Nothing is written to disk and nothing is fetched. The settings are those of this metric:
        a keyword such as `num_labels=2` is accepted where it says the same, and is a ValueError otherwise, as is every
        keyword that neither the metric nor `evaluate` knows.

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


def check_integer(value: Any, name: str) -> None:
    if not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name} must be an integer, got {value!r}")


def check_num_labels(num_labels: int) -> None:
    check_integer(num_labels, "num_labels")
    if num_labels < 1:
        raise ValueError(f"num_labels must be at least 1, got {num_labels}")


def check_outside_classes(value: int, num_labels: int, name: str) -> None:
    """Raises ValueError for a setting that stands for "no class" but is one of 0..num_labels - 1."""
    check_integer(value, name)
    if 0 <= value < num_labels:
        raise ValueError(f"{name} must be outside the classes 0..{num_labels - 1}, got {value}")


def check_dilation_ratio(dilation_ratio: float) -> None:
    if not isinstance(dilation_ratio, (int, float, np.integer, np.floating)) or not 0 < dilation_ratio <= 1:
        raise ValueError(f"dilation_ratio must be above 0 and at most 1, got {dilation_ratio!r}")


def check_same_shape(predicted: np.ndarray, actual: np.ndarray, where: str) -> None:
    if predicted.shape != actual.shape:
        raise ValueError(f"{where}: prediction has shape {predicted.shape} but reference {actual.shape}")


def whole_numbers(values: Sequence[Any], name: str) -> np.ndarray:
    """(N,) int64 of numbers; ValueError for the first that is not whole or that int64 does not hold."""
    if set(map(type, values)) == {int} and min(values) >= -(2**63) and max(values) < 2**63:
        return np.array(values, dtype=np.int64)  # nearly always, and five times as fast as one by one
    return np.array([_whole_number(value, name) for value in values], dtype=np.int64)


def _whole_number(value: Any, name: str) -> int:
    if isinstance(value, (float, np.floating)) and value.is_integer():
        value = int(value)
    try:
        number = operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from error
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must lie in -2^63..2^63 - 1, got {number}")
    return number


def set_pixels(mask: np.ndarray) -> np.ndarray:
    """Bool array of the pixels of a mask that are set: those that are not zero.

    Raises:
        ValueError: the mask holds no numbers, or floating-point ones other than 0 and 1. Probabilities and logits
            have no pixels that are set until the caller applies a threshold.
    """
    if mask.dtype.kind not in "buif":
        raise ValueError(f"a mask must hold bool, integers or 0.0 and 1.0, got {mask.dtype}")
    pixels: np.ndarray = mask != 0
    if mask.dtype.kind == "f":
        apart = pixels ^ (mask == 1)  # nan too
        if apart.any():
            value = mask[apart][0]
            raise ValueError(f"a floating-point mask may only hold 0 and 1, got {value}: apply a threshold first")
    return pixels


def semantic_map(value: Any, where: str) -> np.ndarray:
    """The (H, W) integer array of a semantic map; ValueError for any other shape or type."""
    array = read_array(value, where)
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


def check_counted_labels(labels: np.ndarray, counted: np.ndarray, num_labels: int, where: str) -> None:
    """As `check_labels`, for the places where `counted` (bool, same shape) is set."""
    check_labels(labels if counted.all() else labels[counted], num_labels, where)


def check_given_settings(metric: Metric, given: Mapping[str, Any]) -> None:
    """Raises ValueError for keywords that are not settings of the metric, or that say anything else than it does."""
    for name in given:
        if name not in metric.settings:
            allowed = ["predictions", "references", *metric.settings]
            raise ValueError(f"{name} is not a keyword of {type(metric).__name__}, allowed: {allowed}")
    own = {name: getattr(metric, name) for name in metric.settings}
    other = type(metric)(**{**own, **given})  # brings the values into the metric's form
    for name, value in given.items():
        if getattr(other, name) != own[name]:
            raise ValueError(f"{name} must be {own[name]!r}, with which the metric was made, got {value!r}")


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

        def add(self, *, prediction: Any = None, reference: Any = None, **settings: Any) -> None:
            """Adds one image."""
            # evaluate.combine hands the single entries over under the names of the batches
            prediction = settings.pop("predictions", prediction)
            reference = settings.pop("references", reference)
            check_given_settings(metric, settings)
            metric.update([prediction], [reference])

        def add_batch(self, *, predictions: Any = None, references: Any = None, **settings: Any) -> None:
            """Adds one entry per image."""
            check_given_settings(metric, settings)
            metric.update(predictions, references)

        def compute(self, *, predictions: Any = None, references: Any = None, **settings: Any) -> dict[str, Any]:
            """The figures of all images added, the given ones included; then forgets them."""
            check_given_settings(metric, settings)
            if predictions is not None or references is not None:
                self.add_batch(predictions=predictions, references=references)
            result = metric.compute()
            metric.reset()
            return result

    MetricModule.__name__ = type(metric).__name__
    return MetricModule()
