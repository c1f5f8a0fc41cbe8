"""The rules of post-processing written down plainly: every map is resized, every query is a turn of a loop.

Made for comparison with `hf_maskformer.model.postprocess`, from the descriptions in its docstrings. Masks are (H, W)
numpy arrays; sums and products are float64.
"""

import numpy as np
import torch
from pycocotools import mask as coco

from hf_maskformer.model.resampling import resize_maps


def probabilities_of(class_logits: torch.Tensor, activation: str) -> np.ndarray:
    """(Q, K) float32, without "no object"."""
    if activation == "softmax":
        return class_logits.softmax(-1)[:, :-1].numpy()
    return class_logits.sigmoid()[:, :-1].numpy()


def resized(mask_logits: torch.Tensor, size: tuple[int, int], extent: tuple[float, float]) -> list[np.ndarray]:
    return [resize_maps(logits[None], size, extent)[0].numpy() for logits in mask_logits]


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def semantic(class_logits, mask_logits, size, extent, activation):
    """The label map, and the map of how far apart the two best scores are, relative to the best."""
    probabilities = probabilities_of(class_logits, activation)
    masks = mask_logits.sigmoid()
    scores = np.stack(
        [
            resized((torch.from_numpy(probabilities[:, label])[:, None, None] * masks).sum(0)[None], size, extent)[0]
            for label in range(probabilities.shape[1])
        ]
    )
    two_best = np.sort(scores, axis=0)[-2:]
    return scores.argmax(0), (two_best[1] - two_best[0]) / two_best[1]


def panoptic(class_logits, mask_logits, size, extent, activation, threshold, mask_threshold, overlap, fuse):
    """The id map and (id, label, fused, score) of each segment."""
    probabilities = probabilities_of(class_logits, activation)
    maps = resized(mask_logits, size, extent)
    border = np.float32(np.log(mask_threshold / (1 - mask_threshold)))
    kept = []
    for query, row in enumerate(probabilities):
        no_object = activation == "softmax" and int(class_logits[query].argmax()) == class_logits.shape[1] - 1
        if not no_object and row.max() > threshold:
            kept.append(query)
    best, winner = np.full(size, -1.0), np.full(size, -1)
    for query in kept:
        value = (1 / (1 + np.exp(-maps[query].astype(np.float64)))) * float(probabilities[query].max())
        better = value > best
        best[better], winner[better] = value[better], query
    segmentation, segments = np.zeros(size, dtype=np.int32), []
    for query in kept:
        own = maps[query] >= border
        visible = own & (winner == query)
        if visible.sum() == 0 or visible.sum() < overlap * own.sum():
            continue
        label, score = int(probabilities[query].argmax()), round(float(probabilities[query].max()), 6)
        same = [segment for segment in segments if segment[1] == label and label in fuse]
        if same:
            same[0][3] = max(same[0][3], score)
            segmentation[visible] = same[0][0]
        else:
            segments.append([len(segments) + 1, label, label in fuse, score])
            segmentation[visible] = len(segments)
    return segmentation, segments


def candidates(class_logits, mask_logits, size, extent, activation, threshold, mask_threshold, allowed):
    """(label, score, mask, query) of each instance, best first."""
    probabilities = probabilities_of(class_logits, activation)
    maps = resized(mask_logits, size, extent)
    border = np.float32(np.log(mask_threshold / (1 - mask_threshold)))
    pairs = [(-row[label], query, label) for query, row in enumerate(probabilities) for label in allowed]
    found = []
    for negative, query, label in sorted(pairs)[: len(probabilities)]:
        mask = maps[query] >= border
        score = float(-negative) * (sigmoid(maps[query][mask]).mean() if mask.any() else 0.0)
        if score > threshold:
            found.append((label, score, mask, query))
    return sorted(found, key=lambda one: -one[1])


def painted(instances, size, overlap):
    """The id map and the numbers of the instances that are kept."""
    segmentation, kept = np.zeros(size, dtype=np.int32), []
    for number, (_, _, mask, _) in enumerate(instances):
        visible = mask & (segmentation == 0)
        if visible.sum() > 0 and visible.sum() >= overlap * mask.sum():
            kept.append(number)
            segmentation[visible] = len(kept)
    return segmentation, kept


def rle_of(mask: np.ndarray) -> dict:
    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}
