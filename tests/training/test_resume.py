"""A run that is killed and resumed ends with the weights of one that was not; other runs are refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_maskformer.training.budget import TrainState
from hf_maskformer.training.checkpoint import load_state, newest_checkpoint
from hf_maskformer.training.config import TrainConfig, check_same_run
from hf_maskformer.training.run import Keeper, check_same_processes, open_run
from hf_maskformer.training.train import open_optimizer, train


def test_a_run_killed_in_a_step_ends_with_the_uninterrupted_runs_weights(tiny_run, kill_in_step_3):
    whole = tiny_run("whole", max_steps=5)
    cut = tiny_run("cut", max_steps=5)
    train(whole)
    kill_in_step_3(cut)
    cut.resume = True
    train(cut)
    expected, found = (load_file(f"{c.output_dir}/final/model.safetensors") for c in (whole, cut))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_goes_on_from_the_newest_whole_checkpoint(tiny_run, caplog):
    whole, cut = tiny_run("whole"), tiny_run("cut")
    for config in (whole, cut):
        train(config)
    folder = Path(cut.output_dir) / "checkpoints"
    weights = folder / "step-00000004" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    shutil.rmtree(Path(cut.output_dir) / "final")
    with pytest.raises(ValueError, match=r"already holds a run \(step-00000004\)"):
        train(cut)
    cut.resume = True
    train(cut)
    assert "step-00000004 is not whole and passed over: model.safetensors has" in caplog.text
    expected, found = (load_file(f"{c.output_dir}/final/model.safetensors") for c in (whole, cut))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(tiny_run, tmp_path):
    config = tiny_run()
    train(config)
    config.resume = True
    run = tmp_path / "run"
    for path in (run / "checkpoints").glob("*/optimizer.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    before = [(run / name / "model.safetensors").stat().st_mtime_ns for name in ("best", "final")]
    message = r"none of the checkpoints in .*run.checkpoints is whole \(step-00000002: optimizer\.safetensors .*; "
    with pytest.raises(ValueError, match=message + r"step-00000004: .*\); move the folder away to start anew"):
        train(config)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match=r"is whole \(only best, final are left\); move the folder away"):
        train(config)
    assert before == [(run / name / "model.safetensors").stat().st_mtime_ns for name in ("best", "final")]


def test_a_run_that_ended_before_its_first_checkpoint_is_begun_anew(tiny_run, tmp_path):
    (tmp_path / "run" / "checkpoints" / ".step-00000002.unfinished").mkdir(parents=True)
    alone = SimpleNamespace(is_main_process=True, num_processes=1, wait_for_everyone=lambda: None)
    assert open_run(tmp_path / "run", tiny_run(resume=True), alone) is None


def test_only_the_main_process_undoes_a_replacement_and_the_others_wait_for_it(tiny_run, tmp_path):
    run = tmp_path / "run"
    (run / ".best.replaced").mkdir(parents=True)
    waits = []

    def main_process():
        waits.append((run / "best").exists())
        (run / ".best.replaced").rename(run / "best")

    other = SimpleNamespace(is_main_process=False, num_processes=2, wait_for_everyone=main_process)
    with pytest.raises(ValueError, match=r"already holds a model \(best\)"):
        open_run(run, tiny_run(), other)
    assert waits == [False]


def test_other_processes_may_go_on_with_images_and_not_with_a_stream(tiny_run, tmp_path, caplog):
    (tmp_path / "state.json").write_text(json.dumps({"num_processes": 2}))
    check_same_processes(tmp_path, tiny_run(), 2)
    assert not caplog.text
    check_same_processes(tmp_path, tiny_run(), 1)
    assert "was written by 2 processes, there are 1 now" in caplog.text
    streamed = tiny_run(dataset_options={"streaming": True})
    check_same_processes(tmp_path, streamed, 2)
    with pytest.raises(ValueError, match=r"with 4 processes: .* was written by 2, which divide streamed data"):
        check_same_processes(tmp_path, streamed, 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_split", "test"),
        ("dataset_options", {"length": 7}),
        ("format", "scenes"),
        ("mixed_precision", "bf16"),
        ("max_grad_norm", None),
        ("warmup_steps", 5),
        ("flip_probability", 0.0),
        ("color_jitter", False),
        ("max_class_fraction", 0.5),
        ("intensity_range", (0.0, 4000.0)),
        ("config_overrides", {"num_queries": 5}),
        ("eval_limit", 3),
        ("ema_decay", 0.9),
        ("layer_decay", 0.9),
        ("schedule_steps", (0.5,)),
        ("gradient_checkpointing", True),
    ],
)
def test_an_option_that_makes_another_run_is_refused(name, value):
    both = {"max_steps": 1}
    if name == "schedule_steps":
        both |= {"schedule": "step", name: (0.9,)}
    stored = json.loads(json.dumps(TrainConfig(**both).to_dict()))
    with pytest.raises(ValueError, match=f"{name}: .* then, .* now"):
        check_same_run(stored, TrainConfig(**{**both, name: value}))


def test_the_scale_of_fp16_gradients_is_resumed(tmp_path):
    """Without a GPU: the scaler of a stand-in accelerator."""

    def accelerator():
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return SimpleNamespace(
            scaler=scaler,
            is_main_process=True,
            num_processes=1,
            unwrap_model=lambda model: model,
            wait_for_everyone=lambda: None,
            log_with=[],
        )

    class Saved(torch.nn.Linear):
        def save_pretrained(self, folder):
            folder.mkdir(exist_ok=True)
            save_file(self.state_dict(), folder / "model.safetensors")

    config = TrainConfig(max_steps=1, output_dir=str(tmp_path))
    model, first, second = Saved(2, 2), accelerator(), accelerator()
    optimizer, _ = open_optimizer(config, model, first, None)
    first.scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    first.scaler.update(4.0)
    keeper = Keeper(tmp_path, config, first, model, model, optimizer, None, resumed=TrainState())
    keeper.save_checkpoint(TrainState(step=1))
    checkpoint = newest_checkpoint(tmp_path / "checkpoints")
    assert load_state(checkpoint)["scaler"]["scale"] == 4.0
    _, state = open_optimizer(config, model, second, checkpoint)
    assert second.scaler.get_scale() == 4.0
    assert state.step == 1
