"""The loop on tiny scenes: what it writes, resuming, accumulation, and what happens to bad input."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.training import train as train_module
from hf_maskformer.training.train import train


def log_lines(config):
    path = f"{config.output_dir}/log.jsonl"
    with open(path) as file:
        return [json.loads(line) for line in file]


def weights(config, name="final"):
    return load_file(f"{config.output_dir}/{name}/model.safetensors")


def test_a_run_writes_all_it_promises(tiny_run, tmp_path):
    config = tiny_run(evaluations=2)
    metrics = train(config)
    run = tmp_path / "run"
    assert metrics["steps"] == 4
    assert {"pq", "mean_iou", "map"} <= set(metrics)
    assert json.loads((run / "metrics.json").read_text())["pq"] == pytest.approx(metrics["pq"])
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000002", "step-00000004"]
    assert [path.name for path in sorted((run / "samples").iterdir())] == ["step-00000002.png", "step-00000004.png"]
    steps = [line for line in log_lines(config) if "event" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    named = {"loss", "loss_class", "loss_mask", "loss_dice", "grad_norm", "learning_rate", "images_per_second"}
    for name in ("loss_class", "loss_mask", "loss_dice"):
        assert steps[0][name] == pytest.approx(steps[0][f"{name}/layer_0"] + steps[0][f"{name}/layer_1"])
    assert named | {"data_seconds", "progress", "minutes"} <= set(steps[0])
    assert [line["step"] for line in log_lines(config) if line.get("event") == "evaluation"] == [2, 4]
    for name in ("best", "final"):
        model = HfMaskFormerForUniversalSegmentation.from_pretrained(run / name)
        processor = HfMaskFormerImageProcessor.from_pretrained(run / name)
        assert model.config.task == processor.task == "panoptic"
        assert processor.size["max_height"] == 64


def test_every_parameter_is_trained(tiny_run):
    config = tiny_run(max_steps=2, schedule="constant", checkpoint_every=1, keep_checkpoints=3, weight_decay=0.0)
    train(config)
    first = load_file(f"{config.output_dir}/checkpoints/step-00000001/model/model.safetensors")
    last = weights(config)
    unchanged = {name for name in first if first[name].is_floating_point() and torch.equal(first[name], last[name])}
    # Queries start at zero and their positions are not added to the values: nothing for this matrix to multiply.
    assert unchanged == {"model.query_decoder.layers.0.self_attention.value.weight"}


def test_a_resumed_run_ends_with_the_uninterrupted_runs_weights(tiny_run, monkeypatch):
    whole, cut = tiny_run("whole"), tiny_run("cut")
    train(whole)

    def killed_at_step_3(*args, step, **keywords):
        if step == 3:
            raise KeyboardInterrupt
        return training_step(*args, step=step, **keywords)

    training_step = train_module.training_step
    monkeypatch.setattr(train_module, "training_step", killed_at_step_3)
    with pytest.raises(KeyboardInterrupt):
        train(cut)
    monkeypatch.undo()
    assert log_lines(cut)[-1]["step"] == 3
    cut.resume = True
    train(cut)
    expected, found = weights(whole), weights(cut)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    losses = [[(line["step"], line.get("loss")) for line in log_lines(config)] for config in (whole, cut)]
    assert losses[0] == losses[1]


def test_a_run_is_not_overwritten(tiny_run):
    config = tiny_run(max_steps=2, val_split=None)
    train(config)
    with pytest.raises(ValueError, match=r"already holds a run \(step-00000002\); add --resume"):
        train(config)


def test_accumulated_batches_give_the_loss_and_gradient_of_one_batch(tiny_run):
    """The gradient's norm shows a wrong scale, to which AdamW's weights would be blind."""
    overrides = {**tiny_run().config_overrides, "backbone_freeze_batch_norm": True}
    logged = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        config = tiny_run(
            f"accumulation-{accumulation}",
            config_overrides=overrides,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            val_split=None,
        )
        train(config)
        logged.append(log_lines(config)[0])
    for name in ("loss", "loss_class", "loss_mask", "loss_dice", "grad_norm"):
        assert logged[0][name] == pytest.approx(logged[1][name], rel=1e-4), name


def test_a_loss_that_is_not_finite_names_the_images_and_keeps_the_checkpoint(tiny_run, monkeypatch, tmp_path):
    config = tiny_run()
    forward = HfMaskFormerForUniversalSegmentation.forward
    calls = []

    def broken(self, *args, **keywords):
        output = forward(self, *args, **keywords)
        calls.append(1)
        if len(calls) == 4:
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(HfMaskFormerForUniversalSegmentation, "forward", broken)
    with pytest.raises(FloatingPointError, match=r"step 3: the loss is nan; .*'scene-0-0-00000\d'"):
        train(config)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_a_gradient_that_is_not_finite_ends_the_run(tiny_run, monkeypatch, max_grad_norm):
    forward = HfMaskFormerForUniversalSegmentation.forward

    def broken(self, *args, **keywords):
        output = forward(self, *args, **keywords)
        output.loss.register_hook(lambda gradient: gradient * float("nan"))
        return output

    monkeypatch.setattr(HfMaskFormerForUniversalSegmentation, "forward", broken)
    with pytest.raises(FloatingPointError, match=r"step 0: the gradient's norm is nan; .*'scene-0-0-00000\d'"):
        train(tiny_run(max_grad_norm=max_grad_norm))


def test_without_clipping_the_norm_is_logged_and_the_gradient_is_whole(tiny_run):
    weights_of = []
    for name, limit in (("none", None), ("huge", 1e9)):
        config = tiny_run(name, max_grad_norm=limit, max_steps=1, val_split=None)
        train(config)
        assert log_lines(config)[0]["grad_norm"] > 0
        weights_of.append(weights(config))
    assert all(torch.equal(weights_of[0][name], weights_of[1][name]) for name in weights_of[0])


@pytest.fixture
def folder_with_a_truncated_image(tmp_path):
    """Four semantic maps; the third image's file is cut in the middle, after its header."""
    root = tmp_path / "data"
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (root / "train" / part).mkdir(parents=True)
    for index in range(4):
        image = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(image).save(root / "train" / "images" / f"photo{index}.jpg", quality=95)
        labels = np.repeat(np.arange(2, dtype=np.uint8), 32)[None].repeat(48, axis=0)
        Image.fromarray(labels).save(root / "train" / "labels" / f"photo{index}.png")
    (root / "id2label.json").write_text(json.dumps({"0": "left", "1": "right"}))
    path = root / "train" / "images" / "photo2.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return root


def test_a_truncated_image_ends_the_run_or_is_passed(tiny_run, folder_with_a_truncated_image, tmp_path, caplog):
    options = {
        "dataset": str(folder_with_a_truncated_image),
        "dataset_options": {"cache_dir": str(tmp_path / "cache")},
        "val_split": None,
        "max_steps": 3,
    }
    with pytest.raises(ValueError, match=r"photo2\.jpg"):
        train(tiny_run("raise", **options))
    with caplog.at_level(logging.WARNING):
        summary = train(tiny_run("skip", **options, on_bad_sample="skip"))
    assert summary["steps"] == 3
    assert "photo2.jpg" in caplog.text


def test_classes_that_differ_between_the_splits_are_refused(tiny_run, monkeypatch):
    from hf_maskformer.training import setup

    def load(path, split, **options):
        data = original(path, split=split, **options)
        if split == "val":
            data.label_spec = type(data.label_spec)(id2label={0: "other"})
        return data

    original = setup.load
    monkeypatch.setattr(setup, "load", load)
    with pytest.raises(ValueError, match="they must be the same"):
        train(tiny_run())


def test_gradient_checkpointing_computes_twice_and_gives_the_same_weights(tiny_run):
    plain, checkpointed = tiny_run("plain"), tiny_run("checkpointed", gradient_checkpointing=True)
    for config in (plain, checkpointed):
        train(config)
    expected, found = weights(plain), weights(checkpointed)
    counts = {
        name for name in expected if name.endswith("stages.0.layers.0.layer.0.normalization.num_batches_tracked")
    }
    assert counts
    assert {(int(expected[name]), int(found[name])) for name in counts} == {(4, 8)}
    for name in expected:
        if "running_" not in name and name.split(".")[-1] != "num_batches_tracked":
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, msg=f"{name} differs")


def scaled(monkeypatch, scale):
    """Let runs on the CPU have a scaler as fp16 has on a GPU, and gradients that are never finite."""

    def opened(config):
        accelerator = open_accelerator(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return accelerator

    def spoilt(accelerator, model, *args, step, **keywords):
        if step == 0:
            next(model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
        return training_step(accelerator, model, *args, step=step, **keywords)

    open_accelerator, training_step = train_module.open_accelerator, train_module.training_step
    monkeypatch.setattr(train_module, "open_accelerator", opened)
    monkeypatch.setattr(train_module, "training_step", spoilt)


def test_a_gradient_that_no_scale_makes_finite_ends_the_run(tiny_run, monkeypatch, tmp_path):
    """Tried with the scales 4, 2 and 1; the log has no word that JSON does not know."""
    scaled(monkeypatch, 4.0)
    with pytest.raises(FloatingPointError, match=r"step 3: the gradient's norm is nan; the images of this step are"):
        train(tiny_run(max_steps=30, val_split=None))
    text = (tmp_path / "run" / "log.jsonl").read_text()
    assert [json.loads(line, parse_constant=pytest.fail)["grad_norm"] for line in text.splitlines()] == [None] * 3
    (folder,) = (tmp_path / "run" / "failures").iterdir()
    assert json.loads((folder / "process-0" / "failure.json").read_text())["loss_scale"] == 0.5


def test_skipped_steps_leave_the_scaler_ready_for_the_next(tiny_run, monkeypatch):
    scaled(monkeypatch, 1.0)
    with pytest.raises(FloatingPointError, match=r"step 10: .* 10 steps in a row were left out"):
        train(tiny_run(max_steps=30, val_split=None, on_nonfinite="skip", checkpoint_every=100))


def matchers(monkeypatch):
    """The matcher of every step's forward pass."""
    seen = []
    step = train_module.training_step

    def watched(accelerator, model, *args, **keywords):
        seen.append(model.criterion.matcher)
        return step(accelerator, model, *args, **keywords)

    monkeypatch.setattr(train_module, "training_step", watched)
    return seen


def test_fixed_matching_becomes_bipartite_also_after_resuming(tiny_run, monkeypatch):
    overrides = {**tiny_run().config_overrides, "matcher": "fixed"}
    options = {"task": "semantic", "config_overrides": overrides, "bipartite_after": 0.5, "val_split": None}
    seen = matchers(monkeypatch)
    config = tiny_run(**options)
    train(config)
    assert seen == ["fixed", "fixed", "hungarian", "hungarian"]
    seen.clear()
    longer = tiny_run(**options, max_steps=12, resume=True)
    train(longer)
    assert seen == ["fixed"] * 2 + ["hungarian"] * 6


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_a_model_without_fixed_matching_does_not_change_to_bipartite(tiny_run, task):
    with pytest.raises(ValueError, match=r"bipartite_after is 0\.5, but the model's matcher is 'hungarian'; it"):
        train(tiny_run(task=task, bipartite_after=0.5))
