"""Model outputs that say exactly what a test wants, and a model that answers with the truth."""

from types import SimpleNamespace

import numpy as np
import torch
from transformers.utils import ModelOutput

from hf_maskformer.data.load import load
from hf_maskformer.data.sample import make_segment, targets_for_task
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor

CANVAS = 64
CONFIDENT = 12.0  # logit


def answers(images, num_labels, size, queries=40):
    """Outputs of one query per mask; `images` is a list of (masks (N, h, w) bool, labels (N,)), `size` the canvas."""
    class_logits = torch.zeros(len(images), queries, num_labels + 1)
    class_logits[..., -1] = CONFIDENT
    mask_logits = torch.full((len(images), queries, *size), -CONFIDENT)
    for index, (masks, labels) in enumerate(images):
        for query, (mask, label) in enumerate(zip(masks, labels, strict=True)):
            class_logits[index, query, label] = 2 * CONFIDENT
            inside = mask_logits[index, query, : mask.shape[0], : mask.shape[1]]
            inside[torch.from_numpy(np.ascontiguousarray(mask))] = CONFIDENT
    return ModelOutput(class_queries_logits=class_logits, masks_queries_logits=mask_logits)


class Oracle(torch.nn.Module):
    """Answers with the targets of the data's rows, one query each, in the order of the data.

    `wrong` rows (a set of their numbers) get an answer that is all class 0.
    """

    def __init__(self, data, rows=None, wrong=()):
        super().__init__()
        self.data = data
        self.rows = rows or [data.row(index) for index in range(len(data))]
        self.wrong = wrong
        spec = data.label_spec
        self.config = SimpleNamespace(id2label=spec.id2label, thing_label_ids=spec.thing_label_ids, task=data.task)
        self.layer = torch.nn.Dropout()
        self.frozen = torch.nn.BatchNorm2d(3).eval()
        self.next_row = 0
        self.training_seen = []

    def forward(self, pixel_values, pixel_mask):
        assert torch.is_inference_mode_enabled()
        self.training_seen.append(self.layer.training)
        images = []
        for _ in pixel_values:
            row = self.rows[self.next_row]
            masks, labels, _ = targets_for_task(row, self.data.task, self.data.label_spec)
            if self.next_row in self.wrong:
                masks, labels = np.ones((1, row["height"], row["width"]), dtype=bool), np.zeros(1, dtype=np.int64)
            images.append((masks, labels))
            self.next_row += 1
        outputs = answers(images, self.data.label_spec.num_labels, pixel_values.shape[2:])
        outputs["valid_extent"] = torch.stack(  # (B, 2)
            [pixel_mask.amax(2).float().mean(1), pixel_mask.amax(1).float().mean(1)], dim=1
        )
        return outputs


def processor_for(data, **settings):
    spec = data.label_spec
    fields = {"task": data.task, "id2label": spec.id2label, "thing_label_ids": list(spec.thing_label_ids), **settings}
    return HfMaskFormerImageProcessor(size={"max_height": CANVAS, "max_width": CANVAS}, **fields)


def data_row(segments, size, name="image.png"):
    """A row without an image; `segments` are (label, mask (H, W), iscrowd)."""
    return {
        "image": {"bytes": None, "path": None},
        "image_id": name,
        "height": size[0],
        "width": size[1],
        "file_name": name,
        "segments": [
            make_segment(number, label, np.asarray(mask, dtype=bool), crowd)
            for number, (label, mask, crowd) in enumerate(segments, start=1)
        ],
    }


def row_of_map(labels, ignore_index=255, name="image.png"):
    """The row of a semantic map."""
    labels = np.asarray(labels)
    present = [int(label) for label in np.unique(labels) if label != ignore_index]
    return data_row([(label, labels == label, False) for label in present], labels.shape, name)


def scenes(task, length=5, image_size=(48, 64)):
    return load("scenes", split="val", task=task, length=length, image_size=image_size)


def scalars(metrics):
    """All numbers of a metrics dict in a fixed order."""
    found = []
    for value in metrics.values():
        if isinstance(value, dict):
            found += scalars(value)
        elif isinstance(value, list):
            found += scalars(dict(enumerate(value)))
        else:
            found.append(value)
    return found
