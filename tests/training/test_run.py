"""What a run's folder holds, in which order it is written, and which folders are left alone."""

import json
import logging

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from hf_maskformer.model.masks import encode_rle
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.training import run as run_module
from hf_maskformer.training.checkpoint import load_state, newest_checkpoint
from hf_maskformer.training.run import MAIN_METRIC, check_same_processes
from hf_maskformer.training.samples import reference_segments
from hf_maskformer.training.train import train


def evaluations(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["images"]) for line in lines if line.get("event") == "evaluation"]


def progress(run):
    return load_state(newest_checkpoint(run / "checkpoints"))["progress"]


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_every_task_is_trained_evaluated_and_drawn(tiny_run, tmp_path, task):
    metrics = train(tiny_run(task=task, max_steps=2, evaluations=2))
    assert MAIN_METRIC[task] in metrics
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 2


def test_where_instances_overlap_the_smaller_one_is_drawn():
    small, large = np.zeros((2, 6, 8), dtype=bool)
    small[2:4, 2:4] = True
    large[1:6, 1:7] = True
    reference = {"masks": [encode_rle(small), encode_rle(large)], "labels": np.array([3, 5])}
    ids, segments = reference_segments(reference, "instance", None, (6, 8))
    assert np.array_equal(ids, np.where(small, 1, np.where(large, 2, 0)))
    assert segments == [{"id": 1, "label_id": 3}, {"id": 2, "label_id": 5}]


def test_an_image_without_instances_has_an_empty_map():
    ids, segments = reference_segments({"masks": [], "labels": np.array([])}, "instance", None, (6, 8))
    assert ids.shape == (6, 8)
    assert not ids.any()
    assert segments == []


def fail_in_evaluation(monkeypatch, at_call):
    calls = []

    def failing(*args, **keywords):
        calls.append(1)
        if len(calls) == at_call:
            raise RuntimeError("evaluation broke")
        return evaluate(*args, **keywords)

    evaluate = run_module.evaluate
    monkeypatch.setattr(run_module, "evaluate", failing)


def test_a_last_evaluation_that_fails_loses_no_weights(tiny_run, tmp_path, monkeypatch):
    config, run = tiny_run(checkpoint_every=100), tmp_path / "run"
    fail_in_evaluation(monkeypatch, at_call=1)
    with pytest.raises(RuntimeError, match="evaluation broke"):
        train(config)
    assert (run / "final" / "model.safetensors").is_file()
    assert progress(run)["step"] == 4
    assert not (run / "metrics.json").exists()
    monkeypatch.undo()
    config.resume = True
    metrics = train(config)
    assert progress(run)["best_value"] == metrics["best_value"]
    assert json.loads((run / "metrics.json").read_text())["steps"] == 4


def test_the_best_value_of_an_evaluation_is_stored_with_it(tiny_run, tmp_path, monkeypatch):
    """Killed right after the evaluation of step 2, between two checkpoints."""
    config, run = tiny_run(evaluations=2, checkpoint_every=100), tmp_path / "run"
    monkeypatch.setattr(run_module.Keeper, "finish", lambda self, state: {})
    train(config)
    assert progress(run)["step"] == 2
    assert progress(run)["evaluations"] == 1
    assert progress(run)["best_step"] == 2
    assert progress(run)["best_value"] is not None


def test_an_evaluation_that_fails_is_made_up_for_at_its_step(tiny_run, tmp_path, monkeypatch):
    config, run = tiny_run(evaluations=2, checkpoint_every=100), tmp_path / "run"
    fail_in_evaluation(monkeypatch, at_call=1)
    with pytest.raises(RuntimeError, match="evaluation broke"):
        train(config)
    monkeypatch.undo()
    config.resume = True
    train(config)
    assert evaluations(run) == [(2, 2), (4, 2)]


def test_the_last_evaluation_is_on_all_images_and_the_best_is_chosen_on_the_same_ones(tiny_run, tmp_path, monkeypatch):
    """The value falls on the limited images and is high on all of them: step 2 must stay the best."""
    values = {(2, 1): 0.5, (4, 1): 0.4, (4, 2): 0.9}
    seen = []

    def evaluate(*args, limit, **keywords):
        images = limit or 2
        seen.append((2 if not seen else 4, images))
        return {"pq": values[seen[-1]]}

    monkeypatch.setattr(run_module, "evaluate", evaluate)
    metrics = train(tiny_run(evaluations=2, eval_limit=1, num_samples=0))
    assert evaluations(tmp_path / "run") == seen == [(2, 1), (4, 1), (4, 2)]
    assert metrics["pq"] == 0.9
    assert (metrics["best_step"], metrics["best_value"]) == (2, 0.5)


@pytest.mark.parametrize("name", ["best", "final"])
def test_a_folder_with_a_model_is_not_trained_into(tiny_run, tmp_path, name):
    config = tiny_run(max_steps=1, val_split=None)
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"run already holds a model \({name}\)"):
        train(config)
    config.resume = True  # there is nothing to go on from
    with pytest.raises(ValueError, match=name):
        train(config)


@pytest.fixture
def folder_with_a_bad_validation_image(tmp_path):
    """Three semantic maps in each split; of the first validation image the header, which indexing reads, is whole."""
    root = tmp_path / "data"
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(2, dtype=np.uint8), 32)[None].repeat(48, axis=0)
    for split in ("train", "val"):
        for part in ("images", "labels"):
            (root / split / part).mkdir(parents=True)
        for index in range(3):
            image = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(image).save(root / split / "images" / f"{split}{index}.jpg", quality=95)
            Image.fromarray(labels).save(root / split / "labels" / f"{split}{index}.png")
    (root / "id2label.json").write_text(json.dumps({"0": "left", "1": "right"}))
    path = root / "val" / "images" / "val0.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return root


def test_a_bad_validation_image_ends_the_run_or_is_skipped(
    tiny_run, folder_with_a_bad_validation_image, tmp_path, caplog
):
    options = {
        "dataset": str(folder_with_a_bad_validation_image),
        "dataset_options": {"cache_dir": str(tmp_path / "cache")},
        "val_dataset_options": {"cache_dir": str(tmp_path / "cache")},
        "max_steps": 1,
    }
    with pytest.raises(ValueError, match=r"val0\.jpg"):
        train(tiny_run("raise", **options))
    with caplog.at_level(logging.WARNING):
        metrics = train(tiny_run("skip", **options, on_bad_sample="skip"))
    assert "val0.jpg" in caplog.text
    assert metrics["skipped"] == 1
    assert "mean_iou" in metrics
    assert (tmp_path / "skip" / "samples" / "step-00000001.png").is_file()


def evaluations_with(monkeypatch, values):
    """Let the evaluations find `values`, the last of them again and again."""
    left = list(values)
    monkeypatch.setattr(run_module, "evaluate", lambda *_, **__: {"pq": left.pop(0) if len(left) > 1 else left[0]})


def test_a_run_without_progress_is_ended(tiny_run, tmp_path, monkeypatch, caplog):
    evaluations_with(monkeypatch, [0.1, 0.3, 0.3, float("nan"), 0.2])
    config = tiny_run(max_steps=8, evaluations=8, num_samples=0, early_stopping_patience=2)
    with caplog.at_level(logging.INFO, logger="hf_maskformer"):
        metrics = train(config)
    assert (metrics["steps"], metrics["best_step"], metrics["best_value"]) == (4, 2, 0.3)
    # After evaluations at steps 1 to 4, two of them no better; the last one counts as that of the end.
    assert [step for step, _ in evaluations(tmp_path / "run")] == [1, 2, 3, 4]
    assert metrics["pq"] is not None
    assert "step 4: the last 2 evaluations were not better than the best" in caplog.text
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_a_better_evaluation_starts_the_count_again_also_after_resuming(tiny_run, tmp_path, monkeypatch):
    config = tiny_run(max_steps=8, evaluations=8, num_samples=0, early_stopping_patience=2)
    evaluations_with(monkeypatch, [0.1, 0.1, 0.2, 0.2, 0.1])
    whole = train(config)
    assert (whole["steps"], whole["best_step"]) == (5, 3)
    cut = tiny_run("cut", **{name: getattr(config, name) for name in ("max_steps", "evaluations", "num_samples")})
    cut.early_stopping_patience = 2
    evaluations_with(monkeypatch, [0.1, 0.1, 0.2, 0.2])
    save = run_module.Keeper.save_checkpoint

    def killed(keeper, state):
        save(keeper, state)
        if state.evaluations == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module.Keeper, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        train(cut)
    assert progress(tmp_path / "cut")["evaluations_since_best"] == 1
    monkeypatch.setattr(run_module.Keeper, "save_checkpoint", save)
    evaluations_with(monkeypatch, [0.1])
    cut.resume = True
    assert (train(cut)["steps"], progress(tmp_path / "cut")["best_step"]) == (5, 3)


def test_after_an_early_stop_only_the_images_left_out_before_are_still_to_be_measured(tiny_run, tmp_path, monkeypatch):
    evaluations_with(monkeypatch, [0.3, 0.2, 0.1])
    options = {"max_steps": 8, "evaluations": 8, "num_samples": 0, "early_stopping_patience": 1, "eval_limit": 1}
    metrics = train(tiny_run(**options))
    assert evaluations(tmp_path / "run") == [(1, 1), (2, 1), (2, 2)]
    assert metrics["pq"] == 0.1


def test_a_longer_budget_spreads_the_evaluations_that_are_left(tiny_run, tmp_path, monkeypatch):
    evaluations_with(monkeypatch, [0.1])
    train(tiny_run(max_steps=2, evaluations=2, num_samples=0))
    train(tiny_run(max_steps=8, evaluations=2, num_samples=0, resume=True, schedule="poly"))
    assert [step for step, _ in evaluations(tmp_path / "run")] == [1, 2, 4, 8]


def test_more_evaluations_are_made_from_where_the_run_is(tiny_run, tmp_path, monkeypatch):
    """Interrupted at step 4 of 8, where one evaluation was to come at the end; 4 of them have places 2, 4, 6, 8."""
    evaluations_with(monkeypatch, [0.1])
    save = run_module.Keeper.save_checkpoint

    def killed(keeper, state):
        save(keeper, state)
        if state.step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module.Keeper, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_run(max_steps=8, evaluations=1, num_samples=0))
    monkeypatch.setattr(run_module.Keeper, "save_checkpoint", save)
    train(tiny_run(max_steps=8, evaluations=4, num_samples=0, resume=True))
    assert [step for step, _ in evaluations(tmp_path / "run")] == [4, 6, 8]


def test_other_processes_are_warned_of_only_where_steps_have_other_images(tiny_run, tmp_path, caplog):
    (tmp_path / "state.json").write_text(json.dumps({"num_processes": 2, "images_per_step": 8}))
    check_same_processes(tmp_path, tiny_run(batch_size=2, gradient_accumulation_steps=4, images_per_step=8), 1)
    assert not caplog.text
    check_same_processes(tmp_path, tiny_run(batch_size=2, gradient_accumulation_steps=2), 1)
    assert "there are 1 now: steps have other images" in caplog.text


def test_a_finished_run_without_its_metrics_is_evaluated_again(tiny_run, tmp_path, monkeypatch):
    config = tiny_run(max_steps=1, num_samples=0)
    evaluations_with(monkeypatch, [0.4, 0.25])
    train(config)
    (tmp_path / "run" / "metrics.json").unlink()
    config.resume = True
    metrics = train(config)
    assert (metrics["pq"], metrics["best_value"]) == (0.25, 0.4)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["pq"] == 0.25


def test_evaluations_run_without_the_autocast_of_training(tiny_run, monkeypatch):
    """As everyone will run the published weights; the steps themselves keep it, also after an evaluation."""
    seen = []
    forward = HfMaskFormerForUniversalSegmentation.forward

    def watched(self, *args, **keywords):
        seen.append((self.training, torch.is_autocast_enabled("cpu")))
        return forward(self, *args, **keywords)

    monkeypatch.setattr(HfMaskFormerForUniversalSegmentation, "forward", watched)
    AcceleratorState._reset_state()
    try:
        train(tiny_run(max_steps=2, evaluations=2, num_samples=1, mixed_precision="bf16", ema_decay=0.5))
    finally:
        AcceleratorState._reset_state()
    assert set(seen) == {(True, True), (False, False)}
    first_evaluation = seen.index((False, False))
    assert (True, True) in seen[first_evaluation:]


# Trains the configuration in argv[1]; the evaluations, which only the main process makes, find ever less.
WORSE_RUN = """
import json, sys
import torch
torch.set_num_threads(1)
from hf_maskformer.training import run
from hf_maskformer.training.config import TrainConfig, checked_fields
from hf_maskformer.training.train import train

values = iter((0.5, 0.4, 0.3, 0.2, 0.1))
run.evaluate = lambda *_, **__: {"pq": next(values)}
print(train(TrainConfig(**checked_fields(json.loads(sys.argv[1]), "test")))["steps"])
"""


@pytest.mark.slow
def test_two_processes_stop_early_at_the_same_step(tiny_run, in_processes):
    config = tiny_run(max_steps=6, evaluations=6, num_samples=0, early_stopping_patience=2)
    results = in_processes(WORSE_RUN, json.dumps(config.to_dict()))
    assert [(one.code, one.out.strip()) for one in results] == [(0, "3"), (0, "3")], results[1].errors
