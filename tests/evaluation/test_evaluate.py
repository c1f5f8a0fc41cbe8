"""`evaluate` from data to metrics, with a model that answers the truth: every task must then be perfect."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.utils import ModelOutput

from hf_maskformer.data.load import load
from hf_maskformer.data.sample import targets_for_task
from hf_maskformer.evaluation.evaluate import evaluate
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor

CANVAS = 64
CONFIDENT = 12.0  # logit


class Oracle(torch.nn.Module):
    """Answers with the targets of the data's rows, one query each, in the order of the data."""

    def __init__(self, data, queries=40):
        super().__init__()
        self.data, self.queries = data, queries
        spec = data.label_spec
        self.config = SimpleNamespace(id2label=spec.id2label, thing_label_ids=spec.thing_label_ids, task=data.task)
        self.layer = torch.nn.Dropout()
        self.frozen = torch.nn.BatchNorm2d(3).eval()
        self.next_row = 0
        self.training_seen = []

    def forward(self, pixel_values, pixel_mask):
        assert torch.is_inference_mode_enabled()
        self.training_seen.append(self.layer.training)
        batch, _, height, width = pixel_values.shape
        class_logits = torch.zeros(batch, self.queries, self.data.label_spec.num_labels + 1)
        class_logits[..., -1] = CONFIDENT
        mask_logits = torch.full((batch, self.queries, height, width), -CONFIDENT)
        for index in range(batch):
            row = self.data.row(self.next_row)
            self.next_row += 1
            masks, labels, _ = targets_for_task(row, self.data.task, self.data.label_spec)
            for query, (mask, label) in enumerate(zip(masks, labels, strict=True)):
                class_logits[index, query, label] = 2 * CONFIDENT
                inside = mask_logits[index, query, : mask.shape[0], : mask.shape[1]]
                inside[torch.from_numpy(mask)] = CONFIDENT
        extent = torch.stack([pixel_mask.amax(2).float().mean(1), pixel_mask.amax(1).float().mean(1)], dim=1)  # (B, 2)
        return ModelOutput(class_queries_logits=class_logits, masks_queries_logits=mask_logits, valid_extent=extent)


def scenes(task, length=5, image_size=(48, 64)):
    return load("scenes", split="val", task=task, length=length, image_size=image_size)


def processor_for(data, **settings):
    spec = data.label_spec
    fields = {"task": data.task, "id2label": spec.id2label, "thing_label_ids": list(spec.thing_label_ids), **settings}
    return HfMaskFormerImageProcessor(size={"max_height": CANVAS, "max_width": CANVAS}, **fields)


@pytest.mark.parametrize(
    ("task", "keys"),
    [
        ("semantic", ("mean_iou", "overall_accuracy", "mean_accuracy")),
        ("instance", ("map", "map_50", "map_75")),
        ("panoptic", ("pq", "sq", "rq", "pq_things", "pq_stuff", "mean_iou", "map_50")),
    ],
)
def test_true_answers_score_one(task, keys):
    data = scenes(task)
    metrics = evaluate(Oracle(data), processor_for(data), data, batch_size=2, progress=False)
    assert {key: metrics[key] for key in keys} == {key: pytest.approx(1.0, abs=1e-6) for key in keys}


def test_wrong_answers_score_less():
    data = scenes("panoptic")
    oracle = Oracle(data)
    oracle.next_row = 1  # the truth of the next image
    metrics = evaluate(oracle, processor_for(data), data, progress=False, limit=3)
    assert metrics["pq"] < 0.7
    assert metrics["map"] < 0.5
    assert metrics["mean_iou"] < 0.9


def test_flat_panoptic_keys():
    data = scenes("panoptic", length=1)
    metrics = evaluate(Oracle(data), processor_for(data), data, progress=False)
    assert set(metrics) == {
        *("pq", "sq", "rq", "pq_things", "pq_stuff", "per_category", "mean_iou"),
        *("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "map_per_category"),
    }


def test_panoptic_data_serves_the_other_tasks():
    data = scenes("panoptic")
    oracle = Oracle(data)
    assert evaluate(oracle, processor_for(data), data, task="semantic", progress=False)["mean_iou"] > 0.999
    semantic = scenes("semantic")
    with pytest.raises(ValueError, match=r"loaded for task 'semantic' but task is 'panoptic'"):
        evaluate(Oracle(semantic), processor_for(semantic), semantic, task="panoptic", progress=False)


def test_modes_are_put_back_and_the_processor_is_unchanged():
    data = scenes("semantic", length=2)
    oracle, processor = Oracle(data).train(), processor_for(data)
    oracle.frozen.eval()
    evaluate(oracle, processor, data, progress=False)
    assert oracle.training_seen == [False]
    assert oracle.training
    assert oracle.layer.training
    assert not oracle.frozen.training
    assert processor.task == "semantic"


def test_modes_are_put_back_after_an_error():
    data = scenes("semantic", length=2)
    oracle = Oracle(data).train()
    oracle.next_row = 7  # beyond the data
    with pytest.raises(IndexError):
        evaluate(oracle, processor_for(data), data, progress=False)
    assert oracle.layer.training


def test_limit_and_batches_cover_each_image_once():
    data = scenes("semantic", length=5)
    oracle = Oracle(data)
    evaluate(oracle, processor_for(data), data, batch_size=2, limit=3, progress=False)
    assert oracle.next_row == 3
    assert len(oracle.training_seen) == 2


def test_nothing_to_evaluate_is_refused():
    data = scenes("semantic", length=2)
    with pytest.raises(ValueError, match="nothing to evaluate: data has 2 images and limit is 0"):
        evaluate(Oracle(data), processor_for(data), data, limit=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id2label": {0: "one"}, "thing_label_ids": None}, "the processor has 1 classes but the data 7"),
        ({"thing_label_ids": [0]}, r"the processor's thing_label_ids are \[0\] but the data's"),
        ({"task": "semantic"}, "the processor's task is 'semantic' but the model's is 'panoptic'"),
    ],
)
def test_disagreement_is_refused(settings, message):
    data = scenes("panoptic", length=2)
    with pytest.raises(ValueError, match=message):
        evaluate(Oracle(data), processor_for(data, **settings), data, task="panoptic", progress=False)


def test_classes_in_another_order_are_refused():
    data = scenes("semantic", length=2)
    names = list(data.label_spec.id2label.values())
    swapped = dict(enumerate([names[1], names[0], *names[2:]]))
    with pytest.raises(ValueError, match="the processor has the data's classes in another order"):
        evaluate(Oracle(data), processor_for(data, id2label=swapped), data, progress=False)


def test_crowds_reach_the_metric():
    data = scenes("instance", length=1)
    oracle = Oracle(data)
    row = data.row(0)
    things = [one for one in row["segments"] if one["label_id"] in data.label_spec.thing_label_ids]
    for segment in things:
        segment["iscrowd"] = True
    data.row = lambda index: row
    metrics = evaluate(oracle, processor_for(data), data, progress=False)
    assert metrics["map"] == -1.0  # nothing is left that must be found
    assert np.all(np.array(metrics["per_category"]) == -1.0)
