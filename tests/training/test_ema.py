"""Averaged weights: the arithmetic, the exact return of the model's own, and a killed run that is resumed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_maskformer.training import run as run_module
from hf_maskformer.training.ema import WeightAverage, warm_decay
from hf_maskformer.training.train import train


def one_weight(value, dtype=torch.float32):
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    return set_weight(model, value)


def set_weight(model, value):
    nn.init.constant_(model.weight, value)
    return model


def test_the_decay_rises_to_the_wanted_one():
    assert [warm_decay(0.9, update) for update in (1, 2, 80, 81)] == [2 / 11, 3 / 12, 0.9, 0.9]
    assert warm_decay(0.9, 79) == 80 / 89


def test_the_average_by_hand():
    model = one_weight(1.0)
    average = WeightAverage(model, 0.5)
    average.update(set_weight(model, 3.0), 1)  # decay 2 / 11
    assert average.state_dict()["weight"].item() == pytest.approx(1 * 2 / 11 + 3 * 9 / 11)
    before = average.state_dict()["weight"].item()
    average.update(set_weight(model, 7.0), 100)  # decay 0.5
    assert average.state_dict()["weight"].item() == pytest.approx((before + 7) / 2)


def test_small_changes_of_bfloat16_weights_are_not_lost():
    model = one_weight(1.0, torch.bfloat16)
    average = WeightAverage(model, 0.9999)
    assert average.state_dict()["weight"].dtype == torch.float32
    set_weight(model, 2.0)
    for _ in range(10):
        average.update(model, 10**6)
    assert average.state_dict()["weight"].item() == pytest.approx(2 - 0.9999**10, abs=1e-6)


def test_the_models_own_weights_come_back_after_an_error():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].bias.requires_grad_(False)
    average = WeightAverage(model, 0.9)
    assert set(average.state_dict()) == {"0.weight", "1.weight", "1.bias"}
    first = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter))
    model(torch.rand(5, 3))  # changes the buffers
    own = {name: value.clone() for name, value in model.state_dict().items()}

    def check_and_fail():
        with average.applied(model):
            inside = model.state_dict()
            averaged = average.state_dict()
            assert all(torch.equal(inside[name], first[name]) == (name in averaged) for name in first)
            assert all(torch.equal(inside[name], own[name]) == (name not in averaged) for name in own)
            raise RuntimeError("evaluation broke")

    with pytest.raises(RuntimeError, match="evaluation broke"):
        check_and_fail()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_other_parameters_are_refused():
    average = WeightAverage(one_weight(1.0), 0.9)
    with pytest.raises(ValueError, match=r"other parameters than this model's; differing: \['bias', 'weight'\]"):
        average.load_state_dict({"bias": torch.zeros(1)})


def tensors(run, name="final/model.safetensors"):
    return load_file(Path(run) / name)


def equal(first, second):
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_averaging_changes_what_is_published_and_not_what_is_trained(tiny_run, tmp_path, monkeypatch):
    measured = []
    evaluate = run_module.evaluate

    def recording(model, *args, **keywords):
        measured.append({name: value.clone() for name, value in model.state_dict().items()})
        return evaluate(model, *args, **keywords)

    train(tiny_run("plain", evaluations=2))
    monkeypatch.setattr(run_module, "evaluate", recording)
    train(tiny_run("averaged", evaluations=2, ema_decay=0.9))
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    checkpoint = "checkpoints/step-00000004"
    assert equal(*(tensors(run, f"{checkpoint}/model/model.safetensors") for run in (plain, averaged)))
    assert not (plain / checkpoint / "ema.safetensors").exists()
    average, final = tensors(averaged, f"{checkpoint}/ema.safetensors"), measured[-1]
    assert average
    assert all(torch.equal(final[name], average[name]) for name in average)
    assert equal(tensors(averaged), {name: final[name] for name in tensors(averaged)})
    assert not equal(tensors(averaged), tensors(plain))


def test_a_killed_run_ends_with_the_averages_of_an_uninterrupted_one(tiny_run, kill_in_step_3):
    whole, cut = (tiny_run(name, max_steps=5, ema_decay=0.9) for name in ("whole", "cut"))
    train(whole)
    kill_in_step_3(cut)
    cut.resume = True
    train(cut)
    for name in (
        "final/model.safetensors",
        *(f"checkpoints/step-00000005/{n}.safetensors" for n in ("ema", "optimizer")),
    ):
        assert equal(tensors(whole.output_dir, name), tensors(cut.output_dir, name)), name


@pytest.mark.slow
def test_two_processes_have_the_averages_of_one(tiny_run, train_in_processes):
    overrides = {**tiny_run().config_overrides, "backbone_freeze_batch_norm": True, "query_decoder_dropout": 0.0}
    options = {"ema_decay": 0.9, "max_steps": 2, "config_overrides": overrides, "val_split": None}
    one, two = tiny_run("one", **options, batch_size=4), tiny_run("two", **options)
    train(one)
    train_in_processes(two)
    for name in ("final/model", "checkpoints/step-00000002/ema"):
        expected, found = (tensors(c.output_dir, f"{name}.safetensors") for c in (one, two))
        assert set(found) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-5, msg=key)


def test_a_checkpoint_that_lost_its_averages_is_not_resumed(tiny_run):
    config = tiny_run(ema_decay=0.9, max_steps=2)
    train(config)
    (Path(config.output_dir) / "checkpoints" / "step-00000002" / "ema.safetensors").unlink()
    config.resume = True
    with pytest.raises(ValueError, match=r"step-00000002: ema\.safetensors is missing"):
        train(config)
