"""The stored segments of a row, and how masks as runs become them."""

from collections.abc import Sequence
from typing import Any

from hf_maskformer.model.masks import MaskRuns


def stored_segment(
    segment_id: int, label_id: int, iscrowd: bool, area: float, bbox: Sequence[float], counts: str
) -> dict[str, Any]:
    """A segment of `sample.FEATURES`; `counts` is the compressed code of the mask, `bbox` [x, y, width, height]."""
    return {
        "id": segment_id,
        "label_id": label_id,
        "iscrowd": iscrowd,
        "area": float(area),
        "bbox": list(bbox),
        "rle": counts,
    }


def runs_to_segments(
    runs: MaskRuns, ids: Sequence[int], label_ids: Sequence[int], crowds: Sequence[bool] | None = None
) -> list[dict[str, Any]]:
    """The stored segment of each of N masks, with its own pixel count and box; a mask without a pixel has area 0."""
    crowds = [False] * len(ids) if crowds is None else crowds
    columns = zip(ids, label_ids, crowds, runs.areas().tolist(), runs.boxes().tolist(), runs.rles(), strict=True)
    return [
        stored_segment(segment_id, label_id, iscrowd, area, box, code["counts"])
        for segment_id, label_id, iscrowd, area, box, code in columns
    ]
