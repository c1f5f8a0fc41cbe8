"""`evaluate` from data to metrics, with a model that answers the truth: every task must then be perfect."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_maskformer.data.load import load
from hf_maskformer.data.segmentation_data import SegmentationData
from hf_maskformer.evaluation.details import EvaluationDetails
from hf_maskformer.evaluation.evaluate import Score, evaluate, score_images
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor
from hf_maskformer.model.label_spec import LabelSpec
from model_answers import Oracle, processor_for, scalars, scenes


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


def test_no_larger_neighbour_pads_an_image(tmp_path):
    for part in ("images", "labels"):
        (tmp_path / "val" / part).mkdir(parents=True)
    for number, size in enumerate([(32, 32), (32, 32), (32, 64), (64, 32)]):
        Image.new("RGB", size[::-1]).save(tmp_path / "val" / "images" / f"{number}.png")
        Image.fromarray(np.eye(*size, dtype=np.uint8)).save(tmp_path / "val" / "labels" / f"{number}.png")
    data = load(tmp_path, split="val", task="semantic", cache_dir=str(tmp_path / "cache"))
    processor = processor_for(data)
    processor.size = type(processor.size)(shortest_edge=32, longest_edge=64)
    oracle, seen = Oracle(data), []
    oracle.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["pixel_values"].shape)), with_kwargs=True
    )
    assert evaluate(oracle, processor, data, batch_size=4, progress=False)["mean_iou"] == 1.0
    assert seen == [(2, 3, 32, 32), (1, 3, 32, 64), (1, 3, 64, 32)]
    assert oracle.next_row == 4


def test_wrong_answers_score_less():
    data = scenes("panoptic")
    oracle = Oracle(data)
    oracle.next_row = 1  # the truth of the next image
    metrics = evaluate(oracle, processor_for(data), data, progress=False, limit=3)
    assert metrics["pq"] < 0.7
    assert metrics["map"] < 0.5
    assert metrics["mean_iou"] < 0.9


def test_the_merge_can_be_chosen(monkeypatch):
    data = scenes("panoptic", length=2)
    processor = processor_for(data)
    merges = []
    method = type(processor).__dict__["post_process_panoptic_segmentation"].function

    def recorded(self, *args, **kwargs):
        merges.append(self.panoptic_merge)
        return method(self, *args, **kwargs)

    monkeypatch.setattr(type(processor), "post_process_panoptic_segmentation", recorded)
    for merge in (None, "mask_wise", "argmax"):
        assert evaluate(Oracle(data), processor, data, progress=False, merge=merge)["pq_things"] > 0.99
    assert merges == ["argmax", "mask_wise", "argmax"]
    assert processor.panoptic_merge == "argmax"


@pytest.mark.parametrize(
    ("task", "merge", "message"),
    [
        ("panoptic", "topk", r"merge must be one of \['argmax', 'mask_wise'\]"),
        ("semantic", "argmax", "the task is 'semantic'"),
    ],
)
def test_a_merge_that_cannot_be_is_refused(task, merge, message):
    data = scenes("panoptic", length=1)
    with pytest.raises(ValueError, match=message):
        evaluate(Oracle(data), processor_for(data), data, task=task, progress=False, merge=merge)


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


def test_names_that_differ_are_refused_unless_they_are_not_to_be_compared(caplog):
    data = scenes("semantic", length=2)
    names = {label: f"thing {label}" for label in data.label_spec.id2label}
    oracle, processor = Oracle(data), processor_for(data, id2label=names)
    with pytest.raises(ValueError, match="the processor has other classes than the data: 0 is 'thing 0'"):
        evaluate(oracle, processor, data, progress=False)
    metrics = evaluate(oracle, processor, data, progress=False, ignore_class_names=True)
    assert metrics["mean_iou"] == pytest.approx(1.0)
    assert "class names are not compared" in caplog.text


def test_things_come_from_the_data_where_the_processor_knows_none():
    """As after loading an official checkpoint, whose config has every class as a thing by default."""
    data = scenes("panoptic", length=2)
    oracle, processor = Oracle(data), processor_for(data, thing_label_ids=None, id2label=None, task=None)
    oracle.config.thing_label_ids = sorted(data.label_spec.id2label)
    metrics = evaluate(oracle, processor, data, progress=False)
    assert metrics["pq"] == metrics["pq_stuff"] == pytest.approx(1.0)
    assert processor.thing_label_ids is None
    with pytest.raises(ValueError, match=r"the model's thing_label_ids are \[0, 1, 2, 3, 4, 5, 6\] but the data's"):
        evaluate(oracle, processor_for(data), data, progress=False)


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_boundaries_are_measured_when_asked(task):
    data = scenes(task, length=3)
    plain = evaluate(Oracle(data, wrong={1}), processor_for(data), data, progress=False)
    metrics = evaluate(Oracle(data, wrong={1}), processor_for(data), data, progress=False, boundary=True)
    added = {
        "semantic": {"boundary_iou", "per_category_boundary_iou"},
        "instance": {f"boundary_map{name}" for name in ("", "_50", "_75", "_small", "_medium", "_large")}
        | {"per_category_boundary_map"},
        "panoptic": {f"boundary_{name}" for name in ("pq", "sq", "rq", "pq_things", "pq_stuff")}
        | {"per_category_boundary_pq"},
    }[task]
    assert set(metrics) - set(plain) == added
    main, boundary = {
        "semantic": ("mean_iou", "boundary_iou"),
        "instance": ("map", "boundary_map"),
        "panoptic": ("pq", "boundary_pq"),
    }[task]
    assert metrics[main] == plain[main]
    assert 0 < metrics[boundary] < 1


# --- details ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_details_name_the_wrong_image_and_change_no_metric(task):
    data = scenes(task)
    details = EvaluationDetails(worst=2)
    metrics = evaluate(Oracle(data, wrong={3}), processor_for(data), data, progress=False, details=details)
    plain = evaluate(Oracle(data, wrong={3}), processor_for(data), data, progress=False)
    assert set(metrics) == set(plain)
    np.testing.assert_allclose(scalars(metrics), scalars(plain), rtol=1e-12)
    assert [image.index for image in details.images] == [0, 1, 2, 3, 4]
    assert [image.file_name for image in details.images] == [data.row(index)["file_name"] for index in range(5)]
    scores = [image.score for image in details.images]
    assert scores[3] < 0.5
    assert scores[:3] + scores[4:] == [pytest.approx(1.0)] * 4
    assert details.worst[0].index == 3
    assert len(details.worst) == 2


def test_details_are_forgotten_when_used_again():
    data = scenes("semantic", length=2)
    details = EvaluationDetails(worst=5)
    for _ in range(2):
        evaluate(Oracle(data), processor_for(data), data, progress=False, details=details)
    assert len(details.images) == len(details.worst) == 2
    assert details.confusion.matrix.sum() == 2 * 48 * 64


def test_a_skipped_image_is_listed(caplog):
    data = scenes("semantic", length=3)
    rows = [data.row(index) for index in range(3)]
    rows[1]["image"] = {"bytes": b"no image", "path": None}
    data.row = lambda index: rows[index]
    details = EvaluationDetails()
    oracle = Oracle(data, rows=[rows[0], rows[2]])
    with pytest.raises(ValueError, match=rows[1]["file_name"]):
        evaluate(oracle, processor_for(data), data, progress=False)
    oracle.next_row = 0
    metrics = evaluate(oracle, processor_for(data), data, progress=False, on_bad_sample="skip", details=details)
    assert metrics["skipped"] == 1
    assert metrics["mean_iou"] == pytest.approx(1.0)
    assert [image.note for image in details.images] == ["", "cannot be read", ""]
    assert np.isnan(details.images[1].score)
    assert [image.index for image in details.worst] == [0, 2]
    with pytest.raises(ValueError, match="on_bad_sample 'ignore' is not allowed"):
        evaluate(oracle, processor_for(data), data, on_bad_sample="ignore")


@pytest.fixture
def six_images(tmp_path):
    """Semantic maps: one image is empty, one cut off after its header, one has an empty label file."""
    colours = np.random.default_rng(0)
    for part in ("images", "labels"):
        (tmp_path / "val" / part).mkdir(parents=True)
    for name in "abcdef":
        picture = colours.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "val" / "images" / f"{name}.jpg", quality=95)
        halves = np.repeat(np.arange(2, dtype=np.uint8), 32)[None].repeat(48, axis=0)
        Image.fromarray(halves).save(tmp_path / "val" / "labels" / f"{name}.png")
    (tmp_path / "id2label.json").write_text('{"0": "left", "1": "right"}')
    (tmp_path / "val" / "images" / "b.jpg").write_bytes(b"")
    cut = tmp_path / "val" / "images" / "d.jpg"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (tmp_path / "val" / "labels" / "e.png").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(("limit", "skipped", "listed"), [(None, 3, 6), (1, 2, 3), (3, 3, 5)])
def test_images_left_out_of_the_index_are_counted_and_listed(six_images, limit, skipped, listed):
    for _ in range(2):  # the second opening reads the stored index
        data = load(six_images, split="val", on_bad_sample="skip", cache_dir=str(six_images / "cache"))
        assert [Path(problem.file).name for problem in data.left_out] == ["b.jpg", "e.png"]
        rows = [data.row(index) for index in range(len(data))]
        assert [Path(row["file_name"]).name for row in rows] == ["a.jpg", "c.jpg", "d.jpg", "f.jpg"]
        details = EvaluationDetails()
        metrics = evaluate(
            Oracle(data, rows=[rows[0], rows[1], rows[3]]),
            processor_for(data),
            data,
            progress=False,
            limit=limit,
            on_bad_sample="skip",
            details=details,
        )
        assert metrics["mean_iou"] == pytest.approx(1.0)
        assert metrics["skipped"] == skipped
        assert len(details.images) == listed
        left_out = [image for image in details.images if image.index is None]
        assert [Path(image.file_name).name for image in left_out] == ["b.jpg", "e.png"]
        assert {image.note for image in left_out} == {"cannot be read"}


def test_only_the_first_shard_counts_what_the_index_left_out(six_images):
    data = load(six_images, split="val", on_bad_sample="skip", cache_dir=str(six_images / "cache"))
    rows = [data.row(index) for index in range(4)]
    parts = []
    for number, answered in enumerate((rows[:2], rows[3:])):
        parts.append(Score("semantic", data.label_spec))
        oracle = Oracle(data, rows=answered)
        score_images(oracle, processor_for(data), data, parts[-1], on_bad_sample="skip", shard=(number, 2))
    assert [part.skipped for part in parts] == [2, 1]
    assert parts[0].merge(parts[1]).compute()["skipped"] == 3


def test_outputs_that_are_not_finite_name_the_images():
    data = scenes("semantic", length=3)
    oracle = Oracle(data)
    names = [data.row(index)["file_name"] for index in range(3)]

    def diverged(**inputs):
        outputs = Oracle.forward(oracle, **inputs)
        outputs["class_queries_logits"][:, 0, 0] = float("nan")
        return outputs

    oracle.forward = diverged
    with pytest.raises(FloatingPointError, match=f"not finite.*{names[0]}, {names[1]}$"):
        evaluate(oracle, processor_for(data), data, batch_size=2, progress=False)


def test_instances_need_thing_classes():
    data = SegmentationData([], LabelSpec({0: "sky"}, thing_label_ids=()), "panoptic", "")
    processor = HfMaskFormerImageProcessor()
    with pytest.raises(ValueError, match="task 'instance' needs thing classes, but all classes of the data are stuff"):
        evaluate(None, processor, data, task="instance", progress=False)
