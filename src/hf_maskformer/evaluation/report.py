"""The files of an evaluation: figures for machines, tables and pictures for people."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_maskformer.data.segment_masks import SegmentMasks
from hf_maskformer.data.segmentation_data import (
    SegmentationData,
    instance_reference,
    panoptic_reference,
    semantic_reference,
)
from hf_maskformer.evaluation.confusion_plot import plot_confusion_matrix
from hf_maskformer.evaluation.details import VOID_ID, Confusion, EvaluationDetails, WorstImage, class_segments
from hf_maskformer.evaluation.json_format import write_json
from hf_maskformer.evaluation.scorers import class_map
from hf_maskformer.evaluation.table import class_columns, format_table
from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import rle_area
from hf_maskformer.visualize import MAX_ROW_SHAPE, contact_sheet, draw_errors, draw_segments, with_class_legend

CELL_WIDTH = 420  # pixels of a picture in the sheet
LARGEST_ENLARGEMENT = 3  # of small images

Segmentation = tuple[np.ndarray, list[dict[str, Any]]]


def write_report(
    folder: str | Path, metrics: Mapping[str, Any], data: SegmentationData, task: str, details: EvaluationDetails
) -> list[Path]:
    """Writes what `evaluate` returned and what it filled `details` with; returns the files.

    - metrics.json: the metrics, one flat object;
    - table.txt: the table that is printed; per_class.csv: the same classes for a spreadsheet;
    - confusion_matrix.csv, confusion_matrix.png;
    - images.csv: every image with its score, in the order of the data; those left out of its index come last, without
      a number;
    - worst_images.png, if `details` holds any.

    Raises:
        ValueError: `details` was not filled.
    """
    if details.confusion is None:
        raise ValueError("details must have been handed to evaluate before a report is written")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spec = data.label_spec
    write_json(folder / "metrics.json", metrics)
    (folder / "table.txt").write_text(format_table(metrics, spec.id2label) + "\n", encoding="utf-8")
    _write_csv(folder / "per_class.csv", per_class_rows(metrics, spec))
    _write_csv(folder / "confusion_matrix.csv", confusion_rows(details.confusion))
    plot_confusion_matrix(details.confusion, folder / "confusion_matrix.png")
    _write_csv(folder / "images.csv", image_rows(details))
    names = [
        "metrics.json",
        "table.txt",
        "per_class.csv",
        "confusion_matrix.csv",
        "confusion_matrix.png",
        "images.csv",
    ]
    if details.worst:
        worst_images_sheet(details.worst, data, task, details.score_name).save(folder / "worst_images.png")
        names.append("worst_images.png")
    return [folder / name for name in names]


def per_class_rows(metrics: Mapping[str, Any], label_spec: LabelSpec) -> list[list[Any]]:
    """Header and a row per class: id, name, kind, and `class_columns`; an absent class has empty cells."""
    columns = class_columns(metrics, label_spec.num_labels)
    rows: list[list[Any]] = [["id", "class", "kind", *columns]]
    for label, name in label_spec.id2label.items():
        kind = "thing" if label in label_spec.thing_label_ids else "stuff"
        rows.append([label, name, kind, *(column[label] for column in columns.values())])
    return rows


def confusion_rows(confusion: Confusion) -> list[list[Any]]:
    """Counts with the predicted classes as header and the true class before each row."""
    header = [f"truth \\ prediction ({confusion.counted})", *confusion.columns]
    return [header, *([name, *row] for name, row in zip(confusion.rows, confusion.matrix.tolist(), strict=True))]


def image_rows(details: EvaluationDetails) -> list[list[Any]]:
    """Header and a row per image."""
    header = ["index", "file_name", details.score_name, "note"]
    return [
        header,
        *(
            [image.index, image.file_name, None if math.isnan(image.score) else image.score, image.note]
            for image in details.images
        ),
    ]


def worst_images_sheet(
    images: Sequence[WorstImage], data: SegmentationData, task: str, score_name: str
) -> Image.Image:
    """A row for each image: image, truth, prediction, and where their classes differ (red); void is hatched.

    Classes have the same colour in all pictures and a legend below; rims part the objects of one class. Where the
    truth holds no object (task "instance") any object predicted is wrong, where it is void nothing is.
    """
    panels: list[Image.Image] = []
    titles: list[str] = []
    seen: set[int] = set()
    for worst in images:
        picture = _scaled(Image.fromarray(data.row_image(worst.row)), Image.Resampling.LANCZOS)
        truth, void = truth_map(worst.row, task, data.label_spec)
        maps = [_scaled_map(segmentation, picture.size) for segmentation in (truth, worst.predicted_map())]
        void = np.asarray(Image.fromarray(void).resize(picture.size, Image.Resampling.NEAREST))
        panels.append(picture)
        for ids, segments in maps:
            hatched = (void if ids is maps[0][0] else ids == VOID_ID) if task != "instance" else None
            panels.append(
                draw_segments(picture, ids, segments, color_by="label", labels=False, alpha=0.6, hatched=hatched)
            )
            seen.update(segment["label_id"] for segment in segments)
        true_classes, predicted_classes = (class_map(*segmentation) for segmentation in maps)
        panels.append(draw_errors(picture, (true_classes != predicted_classes) & ~void, hatched=void))
        titles += [worst.row["file_name"], "truth", f"prediction: {score_name} {worst.score:.3f}", "wrong pixels"]
    sheet = contact_sheet(panels, columns=4, titles=titles, cell_width=CELL_WIDTH)
    return with_class_legend(sheet, {label: data.label_spec.id2label[label] for label in sorted(seen)})


def truth_map(row: dict[str, Any], task: str, label_spec: LabelSpec) -> tuple[Segmentation, np.ndarray]:
    """The truth of a data row as id map and segments, and (H, W) bool where it is void, so that nothing counts."""
    if task == "semantic":
        labels = semantic_reference(row, label_spec)
        void = labels == label_spec.ignore_index
        ids = np.where(void, VOID_ID, labels + 1)
        return (ids, [{**segment, "id": segment["id"] + 1} for segment in class_segments(labels[~void])]), void
    if task == "panoptic":
        reference = panoptic_reference(row)
        known = [segment["id"] for segment in reference["segments_info"]]
        return (reference["segmentation"], reference["segments_info"]), ~np.isin(reference["segmentation"], known)
    reference = instance_reference(row, label_spec)
    pixels = np.array([rle_area(rle) for rle in reference["masks"]], dtype=np.int64)
    order = np.argsort(-pixels, kind="stable")  # where objects overlap the smaller one is seen
    size = (row["height"], row["width"])
    ids = SegmentMasks.from_rles([reference["masks"][index] for index in order], size).top_map()
    segments = [
        {"id": number, "label_id": int(reference["labels"][index])} for number, index in enumerate(order, start=1)
    ]
    crowd = np.isin(ids, [n for n, index in enumerate(order, start=1) if reference["iscrowd"][index]])
    return (ids, segments), crowd


def _scaled(picture: Image.Image, resampling: Image.Resampling) -> Image.Image:
    """The picture at the width of a cell, so that lines have the same width in all rows.

    A tall picture is as high as a row can be, and a small one is not blown up.
    """
    scale = min(CELL_WIDTH / picture.width, MAX_ROW_SHAPE * CELL_WIDTH / picture.height, LARGEST_ENLARGEMENT)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), resampling)


def _scaled_map(segmentation: Segmentation, size: tuple[int, int]) -> Segmentation:
    ids, segments = segmentation
    picture = Image.fromarray(ids.astype(np.int32)).resize(size, Image.Resampling.NEAREST)
    return np.asarray(picture), segments


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
