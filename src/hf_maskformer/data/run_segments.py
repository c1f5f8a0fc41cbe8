"""From masks as runs to the stored segments of a row."""

from collections.abc import Sequence
from typing import Any

from hf_maskformer.model.masks import MaskRuns


def runs_to_segments(
    runs: MaskRuns, ids: Sequence[int], label_ids: Sequence[int], crowds: Sequence[bool] | None = None
) -> list[dict[str, Any]]:
    """The stored segment of each of N masks, with its own pixel count and box; a mask without a pixel has area 0."""
    crowds = [False] * len(ids) if crowds is None else crowds
    columns = zip(ids, label_ids, crowds, runs.rles(), runs.areas().tolist(), runs.boxes().tolist(), strict=True)
    return [
        {
            "id": segment_id,
            "label_id": label_id,
            "iscrowd": iscrowd,
            "area": float(area),
            "bbox": box,
            "rle": code["counts"],
        }
        for segment_id, label_id, iscrowd, code, area, box in columns
    ]
