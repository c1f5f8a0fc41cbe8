"""Dice and the 95 % Hausdorff distance (HD95) of label volumes, with the figures of MONAI's metrics of these names.

Both are taken per volume and class, then averaged over the volumes, then over the classes, as is usual for organs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import find_objects
from scipy.spatial import KDTree

from hf_maskformer.evaluation.map_pairs import count_pairs, map_pairs
from hf_maskformer.evaluation.metric import (
    Metric,
    check_counted_labels,
    check_integer,
    check_num_labels,
    check_outside_classes,
    check_same_shape,
    field,
    mean_of_known,
    ratio_or_nan,
    read_array,
)

HAUSDORFF_PERCENTILE = 95
LEAF_SIZE = 32  # of the KD tree: it answers one batch of queries, so larger leaves than scipy's are faster
VOID = 0  # of volumes whose labels are shifted up by one


class VolumeFigures(NamedTuple):
    """What one volume gives for each of K classes."""

    dice: np.ndarray  # (K,) float64, nan where the reference lacks the class
    hd95: np.ndarray  # (K,) float64, nan where reference or prediction lack the class
    in_reference: np.ndarray  # (K,) bool
    in_prediction: np.ndarray  # (K,) bool


class VolumeDice(Metric):
    """Dice and HD95 of label volumes, per volume and class.

    An entry of `update` is a (D, H, W) or (H, W) integer array or tensor of labels, or `{"segmentation": array,
    "spacing": (D, H, W) or (H, W) in millimetres}`. Spacing is read from the reference; without it distances are in
    voxels. A prediction may carry one too, which must be the same (rounding apart). Reference voxels of `ignore_index`
    belong to no class in both volumes, so that both have a surface there. Every other label outside 0..num_labels - 1
    is a ValueError.

    Surfaces are the voxels with a face on another class or on the border of the volume. HD95 is the larger of two 95th
    percentiles: of the distances from the predicted surface to the reference's, and back.

    A class that one volume lacks, as in MONAI:

    | in reference | in prediction | Dice | HD95 | counted in |
    |---|---|---|---|---|
    | yes | no | 0 | left out | `per_category_missed`, `hd95_undefined` |
    | no | yes | left out | left out | `per_category_invented`, `dice_undefined`, `hd95_undefined` |
    | no | no | left out | left out | `dice_undefined`, `hd95_undefined` |

    So a missed or invented object costs nothing in HD95, and an invented one nothing in Dice: read the counts too.
    The state is a few sums per class, however many volumes there are.

    Args:
        num_labels: number of classes K, the background included.
        background: the label that is no class of its own: nan in every list, in no mean and no count. None: none.
        ignore_index: reference value of voxels that are not counted.
    """

    description = "Dice and 95 % Hausdorff distance of label volumes."
    settings = ("num_labels", "background", "ignore_index")

    def __init__(self, num_labels: int, background: int | None = 0, ignore_index: int = 255) -> None:
        check_num_labels(num_labels)
        if background is not None:
            check_integer(background, "background")
            if not 0 <= background < num_labels:
                raise ValueError(f"background must be one of the labels 0..{num_labels - 1} or None, got {background}")
        check_outside_classes(ignore_index, num_labels, "ignore_index")
        self.num_labels = num_labels
        self.background = background
        self.ignore_index = ignore_index
        super().__init__()

    def compute(self) -> dict[str, Any]:
        """Dice as a fraction 0..1, HD95 in millimetres (voxels without spacing); nan where nothing was counted.

        Returns:
            `dice`, `hd95`: means over the classes of `per_category_dice`, `per_category_hd95` (lists indexed by class
            id, each the mean over the volumes where it is defined). `dice_undefined`, `hd95_undefined`: number of
            (volume, class) pairs that are in no mean. `per_category_missed`, `per_category_invented`: volumes where
            only the reference, only the prediction has the class.
        """
        dice = ratio_or_nan(self.dice_sum, self.dice_count)
        hd95 = ratio_or_nan(self.hd95_sum, self.hd95_count)
        pairs = self.num_images * len(self._classes())
        return {
            "dice": mean_of_known(dice),
            "hd95": mean_of_known(hd95),
            "per_category_dice": dice.tolist(),
            "per_category_hd95": hd95.tolist(),
            "dice_undefined": pairs - int(self.dice_count.sum()),
            "hd95_undefined": pairs - int(self.hd95_count.sum()),
            "per_category_missed": self.missed.tolist(),
            "per_category_invented": self.invented.tolist(),
        }

    def _reset_state(self) -> None:
        self.dice_sum = np.zeros(self.num_labels)
        self.hd95_sum = np.zeros(self.num_labels)
        self.dice_count = np.zeros(self.num_labels, dtype=np.int64)
        self.hd95_count = np.zeros(self.num_labels, dtype=np.int64)
        self.missed = np.zeros(self.num_labels, dtype=np.int64)
        self.invented = np.zeros(self.num_labels, dtype=np.int64)

    def _merge_state(self, other: "VolumeDice") -> None:
        self.dice_sum += other.dice_sum
        self.hd95_sum += other.hd95_sum
        self.dice_count += other.dice_count
        self.hd95_count += other.hd95_count
        self.missed += other.missed
        self.invented += other.invented

    def _add_image(self, prediction: Any, reference: Any, where: str) -> None:
        figures = self._figures(prediction, reference, where)
        self.dice_sum += np.nan_to_num(figures.dice)
        self.hd95_sum += np.nan_to_num(figures.hd95)
        self.dice_count += ~np.isnan(figures.dice)
        self.hd95_count += ~np.isnan(figures.hd95)
        self.missed += figures.in_reference & ~figures.in_prediction
        self.invented += figures.in_prediction & ~figures.in_reference

    def _figures(self, prediction: Any, reference: Any, where: str) -> VolumeFigures:
        actual, spacing = _read(reference, f"{where}, reference")
        predicted, predicted_spacing = _read(prediction, f"{where}, prediction")
        check_same_shape(predicted, actual, where)
        if predicted_spacing is not None and (spacing is None or not np.allclose(predicted_spacing, spacing, atol=0)):
            raise ValueError(f"{where}: prediction has spacing {predicted_spacing} but reference {spacing}")
        counted = actual != self.ignore_index
        outside = f"{where}, reference (ignore_index {self.ignore_index} apart)"
        actual = self._shifted(actual, counted, outside)
        predicted = self._shifted(predicted, counted, f"{where}, prediction")

        pairs = map_pairs(actual, predicted)
        size = self.num_labels + 1
        overlap = count_pairs(pairs.first, pairs.second, pairs.lengths, (size, size))[1:, 1:]  # (K, K)
        actual_voxels, predicted_voxels = overlap.sum(axis=1), overlap.sum(axis=0)  # (K,), (K,)
        dice = np.full(self.num_labels, np.nan)
        hd95 = np.full(self.num_labels, np.nan)
        in_reference, in_prediction = np.zeros((2, self.num_labels), dtype=bool)
        actual_boxes, predicted_boxes = find_objects(actual, self.num_labels), find_objects(predicted, self.num_labels)
        step = np.ones(actual.ndim) if spacing is None else np.array(spacing)
        for label in self._classes():
            in_reference[label], in_prediction[label] = actual_voxels[label] > 0, predicted_voxels[label] > 0
            if in_reference[label]:
                dice[label] = 2 * overlap[label, label] / (actual_voxels[label] + predicted_voxels[label])
            if in_reference[label] and in_prediction[label]:
                box = _union_box(actual_boxes[label], predicted_boxes[label])
                hd95[label] = _hausdorff(predicted[box] == label + 1, actual[box] == label + 1, step)
        return VolumeFigures(dice, hd95, in_reference, in_prediction)

    def _classes(self) -> list[int]:
        return [label for label in range(self.num_labels) if label != self.background]

    def _shifted(self, labels: np.ndarray, counted: np.ndarray, where: str) -> np.ndarray:
        """Labels plus 1, VOID where nothing is counted, in the smallest type that holds them."""
        check_counted_labels(labels, counted, self.num_labels, where)
        shifted = labels.astype(np.min_scalar_type(self.num_labels)) + 1
        shifted[~counted] = VOID
        return shifted


def _read(entry: Any, where: str) -> tuple[np.ndarray, tuple[float, ...] | None]:
    """Labels (D, H, W) or (H, W) and the spacing, None where the entry gives none."""
    given = entry if isinstance(entry, Mapping) else {"segmentation": entry}
    labels = read_array(field(given, "segmentation", where), f"{where}: labels")
    if labels.ndim not in (2, 3):
        raise ValueError(f"{where}: labels must have shape (D, H, W) or (H, W), got {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{where}: labels must be integers, got {labels.dtype}")
    if given.get("spacing") is None:
        return labels, None
    steps = read_array(given["spacing"], f"{where}: spacing")
    numbers = steps.dtype.kind in "iuf" and steps.shape == (labels.ndim,)
    if not numbers or not (np.isfinite(steps) & (steps > 0)).all():
        raise ValueError(f"{where}: spacing must be {labels.ndim} positive lengths, got {given['spacing']}")
    return labels, tuple(float(step) for step in steps)


def _union_box(first: Sequence[slice], second: Sequence[slice]) -> tuple[slice, ...]:
    """The smallest box that holds both boxes."""
    return tuple(
        slice(min(one.start, other.start), max(one.stop, other.stop)) for one, other in zip(first, second, strict=True)
    )


def _hausdorff(predicted: np.ndarray, actual: np.ndarray, step: np.ndarray) -> float:
    """HD95 of two masks that are not empty, cut out along the box of both. `step` is the spacing of each axis."""
    predicted_surface, actual_surface = _surface(predicted), _surface(actual)
    forth = _surface_distances(predicted_surface, actual_surface, step)
    back = _surface_distances(actual_surface, predicted_surface, step)
    return float(max(np.percentile(distances, HAUSDORFF_PERCENTILE) for distances in (forth, back)))


def _surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of a mask with a face on the outside; what lies beyond the array is outside."""
    interior = mask.copy()
    for axis in range(mask.ndim):
        inner, values = np.moveaxis(interior, axis, 0), np.moveaxis(mask, axis, 0)  # views
        inner[1:] &= values[:-1]
        inner[:-1] &= values[1:]
        inner[[0, -1]] = False
    return mask & ~interior


def _surface_distances(start: np.ndarray, goal: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Distance (N,) of each of the N voxels of `start` to the nearest voxel of `goal`."""
    distances = np.zeros(np.count_nonzero(start))
    apart = ~goal[start]  # (N,): the others are at distance 0
    if apart.any():
        tree = KDTree(np.argwhere(goal) * step, leafsize=LEAF_SIZE)
        distances[apart] = tree.query(np.argwhere(start)[apart] * step)[0]
    return distances
