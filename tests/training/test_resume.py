"""A run that is killed and resumed ends with the weights of one that was not; other runs are refused."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hf_maskformer.training.budget import TrainState
from hf_maskformer.training.checkpoint import load_state, newest_checkpoint
from hf_maskformer.training.config import TrainConfig, check_same_run
from hf_maskformer.training.run import Keeper
from hf_maskformer.training.train import open_optimizer, train

# Trains the configuration in argv[1]; the process ends itself by SIGKILL in the middle of step 3.
KILLED_RUN = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from hf_maskformer.training import train as module
from hf_maskformer.training.config import TrainConfig, checked_fields

def training_step(*args, step, **keywords):
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, step=step, **keywords)

original, module.training_step = module.training_step, training_step
module.train(TrainConfig(**checked_fields(json.loads(sys.argv[1]), "test")))
"""


def test_a_run_killed_in_a_step_ends_with_the_uninterrupted_runs_weights(tiny_run):
    whole = tiny_run("whole", max_steps=5)
    cut = tiny_run("cut", max_steps=5)
    train(whole)
    killed = subprocess.run([sys.executable, "-c", KILLED_RUN, json.dumps(cut.to_dict())], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert newest_checkpoint(Path(cut.output_dir) / "checkpoints").name == "step-00000002"
    cut.resume = True
    train(cut)
    expected, found = (load_file(f"{c.output_dir}/final/model.safetensors") for c in (whole, cut))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


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
    stored = json.loads(json.dumps(TrainConfig(max_steps=1).to_dict()))
    with pytest.raises(ValueError, match=f"{name}: .* then, .* now"):
        check_same_run(stored, TrainConfig(max_steps=1, **{name: value}))


def test_the_scale_of_fp16_gradients_is_resumed(tmp_path):
    """Without a GPU: the scaler of a stand-in accelerator."""

    def accelerator():
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return SimpleNamespace(
            scaler=scaler,
            is_main_process=True,
            unwrap_model=lambda model: model,
            wait_for_everyone=lambda: None,
            log_with=[],
        )

    class Saved(torch.nn.Linear):
        def save_pretrained(self, folder):
            folder.mkdir(exist_ok=True)

    config = TrainConfig(max_steps=1, output_dir=str(tmp_path))
    model, first, second = Saved(2, 2), accelerator(), accelerator()
    optimizer, _ = open_optimizer(config, model, first, None)
    first.scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    first.scaler.update(4.0)
    keeper = Keeper(tmp_path, config, first, model, model, optimizer, None, resume_step=0)
    keeper.save_checkpoint(TrainState(step=1))
    checkpoint = newest_checkpoint(tmp_path / "checkpoints")
    assert load_state(checkpoint)["scaler"]["scale"] == 4.0
    _, state = open_optimizer(config, model, second, checkpoint)
    assert second.scaler.get_scale() == 4.0
    assert state.step == 1
