"""The failure diary: what it holds, that a step run again from it fails alike, and when a run goes on."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_maskformer.inference.checkpoint import load_checkpoint
from hf_maskformer.training import failure as failure_module
from hf_maskformer.training import train as train_module
from hf_maskformer.training.failure import read_part, write_part
from hf_maskformer.training.replay import replay
from hf_maskformer.training.train import train


def log_lines(config):
    return [json.loads(line) for line in Path(config.output_dir, "log.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one) and set(one) == set(other)


@pytest.fixture
def spoil(monkeypatch):
    """From now on the second image holds a nan in the forward passes with these numbers (from 0)."""

    def spoil_passes(*numbers):
        def move(batch, device):
            moved = original(batch, device)
            if len(calls) in numbers:
                moved["pixel_values"][1, 0, 3, 3] = float("nan")
            calls.append(1)
            return moved

        calls, original = [], train_module.move
        monkeypatch.setattr(train_module, "move", move)

    yield spoil_passes
    monkeypatch.undo()


def test_the_diary_holds_the_step(tiny_run, spoil, tmp_path):
    """Two accumulated passes: step 2 begins with the fifth pass and fails in the sixth."""
    spoil(5)
    config = tiny_run(gradient_accumulation_steps=2, seed=7)
    with pytest.raises(FloatingPointError, match=r"step 2: .*image 0 of the batch.*scene-.*failures/step-00000002"):
        train(config)
    folder = tmp_path / "run" / "failures" / "step-00000002"
    window, record = read_part(folder / "process-0")
    assert [len(batch["image_ids"]) for batch in window] == [2, 2]
    assert (record["step"], record["seed"], record["process"], record["num_processes"]) == (2, 7, 0, 1)
    assert len(record["terms"]) == 1  # the second pass ended before its loss
    layers = {f"loss_{name}/layer_{layer}" for name in ("class", "mask", "dice") for layer in (0, 1)}
    assert set(record["terms"][0]) == {"loss", "loss_class", "loss_mask", "loss_dice", "loss_pixel", *layers}
    assert int(window[1]["pixel_values"].isnan().sum()) == 1
    assert window[0]["pixel_values"].isfinite().all()
    for batch in window:
        assert [len(masks) for masks in batch["mask_labels"]] == [len(labels) for labels in batch["class_labels"]]
    # The weights are those of the checkpoint after two steps, batch norm statistics too.
    load_checkpoint(folder / "model")
    assert same(weights(folder / "model"), weights(tmp_path / "run" / "checkpoints" / "step-00000002" / "model"))
    files = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert files == {".json", ".py", ".safetensors"}  # nothing pickled


def test_a_step_run_again_fails_alike_and_names_the_image(tiny_run, spoil, tmp_path):
    spoil(3)
    with pytest.raises(FloatingPointError, match="step 3"):
        train(tiny_run())
    result = replay(tmp_path / "run" / "failures" / "step-00000003", torch.device("cpu"))
    window, record = read_part(tmp_path / "run" / "failures" / "step-00000003" / "process-0")
    assert result.fails
    assert result.weights == []
    assert [one.error for one in result.passes] == [record["error"]]
    good, bad = window[0]["image_ids"]
    assert result.passes[0].findings[good] == []
    assert result.passes[0].findings[bad][0] == "pixel_values"


@pytest.mark.parametrize("kind", ["plain", "freeze", "lora", "bipartite"])
def test_terms_and_gradient_of_a_step_run_again_are_the_runs(tiny_run, monkeypatch, tmp_path, kind):
    """A healthy step, made to look like a failed one: everything must come out bit for bit, with dropout."""

    def step(accelerator, model, optimizer, window, *, step, max_grad_norm):
        if step < 1:
            return taken(accelerator, model, optimizer, window, step=step, max_grad_norm=max_grad_norm)
        monkeypatch.setattr(accelerator, "clip_grad_norm_", lambda parameters, limit: norm(parameters))
        return taken(accelerator, model, optimizer, window, step=step, max_grad_norm=max_grad_norm)

    def norm(parameters):
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        seen.extend((float(torch.nn.utils.get_total_norm(gradients)), len(gradients)))
        return float("nan")

    overrides = {**tiny_run().config_overrides, "query_decoder_dropout": 0.3}
    options = {"gradient_accumulation_steps": 2, "config_overrides": overrides}
    if kind == "freeze":
        options |= {"freeze": ("backbone", "class_head")}
    elif kind == "lora":
        pytest.importorskip("peft")
        train(tiny_run("before", max_steps=1, **options))
        options |= {"init_from": str(tmp_path / "before" / "final"), "lora_rank": 2, "lora_alpha": 3}
        options |= {"lora_targets": ("backbone", "query_decoder")}
    elif kind == "bipartite":  # the configuration keeps the class-fixed matching of the first step
        options |= {"task": "semantic", "config_overrides": {**overrides, "matcher": "fixed"}, "bipartite_after": 0.25}
    seen, taken = [], train_module.training_step
    monkeypatch.setattr(train_module, "training_step", step)
    with pytest.raises(FloatingPointError, match="step 1: the gradient's norm is nan"):
        train(tiny_run(**options))
    result = replay(tmp_path / "run" / "failures" / "step-00000001", torch.device("cpu"))
    assert not result.fails
    assert [one.terms for one in result.passes] == [one.recorded for one in result.passes]
    assert len(result.passes) == 2
    assert result.grad_norm == pytest.approx(seen[0], rel=1e-5)
    assert len(result.gradients) == seen[1]
    assert (kind == "lora") == any(".lora_A." in name for name in result.gradients)


def test_a_weight_that_is_not_finite_is_named(tiny_run, monkeypatch, tmp_path):
    def broken(config, data, checkpoint):
        model, processor = build(config, data, checkpoint)
        with torch.no_grad():
            model.model.query_decoder.layers[0].self_attention.value.weight[0, 0] = float("inf")
        return model, processor

    build = train_module.build_model
    monkeypatch.setattr(train_module, "build_model", broken)
    with pytest.raises(FloatingPointError, match="step 0"):
        train(tiny_run())
    result = replay(tmp_path / "run" / "failures" / "step-00000000", torch.device("cpu"))
    assert result.fails
    assert result.weights == ["model.query_decoder.layers.0.self_attention.value.weight"]
    assert all(result.passes[0].findings.values())


def test_skip_leaves_the_step_out_and_goes_on(tiny_run, spoil, tmp_path):
    spoil(1)
    config = tiny_run(on_nonfinite="skip", checkpoint_every=1, keep_checkpoints=9)
    assert train(config)["steps"] == 4
    after = [weights(tmp_path / "run" / "checkpoints" / f"step-0000000{step}" / "model") for step in (1, 2, 3)]
    assert same(after[0], after[1])
    assert not same(after[1], after[2])
    assert all(tensor.isfinite().all() for tensor in after[2].values())
    skipped = [line for line in log_lines(config) if line.get("event") == "skipped"]
    assert [line["step"] for line in skipped] == [2]  # counted as those of steps that were taken
    assert "scene-" in skipped[0]["error"]
    assert [line["step"] for line in log_lines(config) if "event" not in line] == [1, 3, 4]


def test_a_resumed_run_does_not_list_a_skipped_step_twice(tiny_run, spoil, monkeypatch):
    """Ended in step 3, after step 2 was left out; the checkpoint is from before that."""

    def stop(*arguments, step, **keywords):
        if step == 3:
            raise KeyboardInterrupt
        return taken(*arguments, step=step, **keywords)

    taken = train_module.training_step
    config = tiny_run(on_nonfinite="skip", val_split=None)
    spoil(2)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    config.resume = True
    spoil(0)  # step 2 is the first pass now
    train(config)
    assert [line["step"] for line in log_lines(config) if line.get("event") == "skipped"] == [3]


def test_ten_skips_in_a_row_end_the_run(tiny_run, spoil, tmp_path, monkeypatch):
    monkeypatch.setattr(failure_module, "MAX_FOLDERS", 3)
    spoil(0, *range(2, 20))
    with pytest.raises(FloatingPointError, match=r"step 11: .*10 steps in a row were left out"):
        train(tiny_run(on_nonfinite="skip", max_steps=30, val_split=None))
    kept = sorted(path.name for path in (tmp_path / "run" / "failures").iterdir())
    assert kept == ["step-00000009", "step-00000010", "step-00000011"]


def test_a_diary_that_cannot_be_written_does_not_hide_the_failure(tiny_run, spoil, tmp_path):
    spoil(0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "failures").write_text("a file in the way")
    with pytest.raises(FloatingPointError, match=r"step 0: Non-finite.*could not be written"):
        train(tiny_run())


def test_a_part_comes_back_as_it_was(tmp_path):
    storage = torch.arange(24.0).reshape(2, 3, 2, 2)
    batch = {
        "pixel_values": storage.transpose(2, 3),
        "pixel_mask": torch.ones(2, 2, 2, dtype=torch.int64),
        "mask_labels": [torch.ones(1, 2, 2, dtype=torch.bool), torch.zeros(0, 2, 2, dtype=torch.bool)],
        "class_labels": [torch.tensor([3]), torch.zeros(0, dtype=torch.int64)],
        "image_ids": ["a", "b"],
    }
    write_part(tmp_path / "part", [batch], {"terms": [{"loss": "nan"}]})
    (found,), record = read_part(tmp_path / "part")
    for name in ("pixel_values", "pixel_mask"):
        assert torch.equal(found[name], batch[name])
    for name in ("mask_labels", "class_labels"):
        for one, other in zip(found[name], batch[name], strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
    assert found["image_ids"] == ["a", "b"]
    assert str(record["terms"][0]["loss"]) == "nan"


@pytest.mark.slow
@pytest.mark.parametrize(("on_nonfinite", "number"), [("raise", 3), ("skip", 2), ("skip", 3)])
def test_two_processes_stop_or_skip_together(tiny_run, tmp_path, train_with_a_bad_image, on_nonfinite, number):
    """Only the second process has the bad image, in the first (2) or the last (3) of the two passes of step 1."""
    config = tiny_run(on_nonfinite=on_nonfinite, gradient_accumulation_steps=2, max_steps=3, val_split=None)
    results = train_with_a_bad_image(config, number)
    assert [one.code for one in results] == [0, 0], results[1].errors
    folder = tmp_path / "run" / "failures" / "step-00000001"
    assert sorted(path.name for path in folder.iterdir()) == ["model", "process-0", "process-1"]
    if on_nonfinite == "skip":
        assert [one.out.split() for one in results] == [["3"], ["3"]]
    else:
        assert all("step 1: Non-finite" in one.out and "(process 1); the images" in one.out for one in results)
    result = replay(folder, torch.device("cpu"))
    own = [(1, True)] * (number - 2)
    assert [(one.process, one.finite) for one in result.passes] == [(0, True), (0, True), *own, (1, False)]
