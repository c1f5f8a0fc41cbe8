"""Assignment of predictions to targets: bipartite (Hungarian), by place, or query k to class k.

Contract: costs of all layers and images come in as one array on the host; out go, per layer and image, the matched
queries and the targets they were given to, both int64, of length min(Q, N).
"""

import numpy as np
import torch
from torch import Tensor
from transformers.utils.import_utils import is_scipy_available

from .objectness import NO_ANCHOR, at_anchors

if is_scipy_available():
    from scipy.optimize import linear_sum_assignment

Match = tuple[np.ndarray, np.ndarray]


def match_hungarian(costs: np.ndarray, num_targets: list[int]) -> list[list[Match]]:
    """Cheapest one-to-one assignment of every layer and image.

    Args:
        costs: (L, B, Q, N) finite costs; the columns of image b beyond `num_targets[b]` are ignored.
        num_targets: Targets per image.

    Raises:
        ImportError: scipy is missing (training needs it, inference does not).
    """
    if not is_scipy_available():
        raise ImportError("Training matches predictions with scipy: pip install scipy")
    return [
        [linear_sum_assignment(image_costs[:, :count]) for image_costs, count in zip(layer, num_targets, strict=True)]
        for layer in costs
    ]


def match_fixed(class_labels: list[np.ndarray], *, num_layers: int) -> list[list[Match]]:
    """Query k takes the target of class k, in every layer (MaskFormer, Table 4: "fixed matching").

    Raises:
        ValueError: A class occurs twice in an image; its targets must be merged into one mask first.
    """
    matches = []
    for index, labels in enumerate(class_labels):
        if len(np.unique(labels)) < len(labels):
            repeated = sorted({int(label) for label in labels if (labels == label).sum() > 1})
            raise ValueError(
                f"matcher 'fixed' needs one mask per class, but class_labels[{index}] repeats {repeated}; merge the "
                "masks of a class (semantic targets) or use matcher 'hungarian'."
            )
        matches.append((labels.astype(np.int64), np.arange(len(labels))))
    return [list(matches) for _ in range(num_layers)]


def location_cost(anchors: Tensor, masks: Tensor, labels: Tensor, stuff_queries: Tensor, *, cost: float) -> Tensor:
    """`cost` for every pair that does not belong together by its place, twice that of stuff and thing: (B, Q, N).

    A query with an anchor belongs to the things whose mask it lies in (FastInst, sec. 3.4), one without to the class
    of stuff that is its own. Added to the other costs, it leaves the choice among the queries that do belong.

    Args:
        anchors: (B, Q, 2) row and column; `NO_ANCHOR` where a query has none.
        masks: (B, N, h, w) at the resolution of the anchors.
        labels: (B, N) classes.
        stuff_queries: (K,) the query of each class of stuff, -1 for a thing.
    """
    own_query = stuff_queries[labels]  # (B, N)
    is_stuff = (own_query >= 0)[:, None, :]  # (B, 1, N)
    query = torch.arange(anchors.shape[1], device=anchors.device)[None, :, None]
    placed = anchors[..., :1] != NO_ANCHOR  # (B, Q, 1)
    inside = at_anchors(masks, anchors.clamp(min=0)) > 0.5  # (B, Q, N)
    belongs = torch.where(is_stuff, query == own_query[:, None, :], placed & inside)
    mixed = is_stuff == placed  # stuff with an anchored query, or a thing with one without an anchor
    return (~belongs) * cost + mixed * cost
