"""A model and a run small enough for a test: seconds on one core; runs in processes of their own."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_maskformer.training.checkpoint import newest_checkpoint
from hf_maskformer.training.config import TrainConfig
from training.stored_models import checkpoint

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
# Trains the configuration in argv[1], whatever it prints goes to stdout.
WHOLE_RUN = """
import json, sys
import torch
torch.set_num_threads(1)
from hf_maskformer.training.config import TrainConfig, checked_fields
from hf_maskformer.training.train import train

print(train(TrainConfig(**checked_fields(json.loads(sys.argv[1]), "test")))["steps"])
"""
# Trains the configuration in argv[1]; on the second of two processes forward pass argv[2] (from 0) has a bad image.
SPOILT_RUN = """
import json, sys
import torch
torch.set_num_threads(1)
from hf_maskformer.training import train as module
from hf_maskformer.training.config import TrainConfig, checked_fields
from hf_maskformer.training.train import train

def move(batch, device):
    moved = original(batch, device)
    calls.append(1)
    if len(calls) == int(sys.argv[2]) + 1 and torch.distributed.get_rank() == 1:
        moved["pixel_values"][1] = float("nan")
    return moved

original, module.move, calls = module.move, move, []
config = TrainConfig(**checked_fields(json.loads(sys.argv[1]), "test"))
try:
    print(train(config)["steps"])
except FloatingPointError as error:
    print(error)
"""
PROCESS_SECONDS = 600

TINY_MODEL = {
    "backbone_config": {
        "model_type": "resnet",
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 8, 16, 16],
        "embedding_size": 8,
        "layer_type": "basic",
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "image_size": [64, 64],
    "pixel_decoder_dim": 16,
    "mask_dim": 16,
    "query_decoder_dim": 16,
    "query_decoder_ffn_dim": 32,
    "query_decoder_layers": 2,
    "query_decoder_heads": 2,
    "num_queries": 12,
}


@pytest.fixture
def tiny_run(tmp_path):
    """Make the configuration of a run on built-in scenes; keywords change its fields."""

    def make(name="run", **changes):
        scenes = {"image_size": 64}
        fields = {
            "dataset": "scenes",
            "output_dir": str(tmp_path / name),
            "dataset_options": {**scenes, "length": 6},
            "val_dataset_options": {**scenes, "length": 2},
            "config_overrides": TINY_MODEL,
            "max_steps": 4,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "num_workers": 0,
            "evaluations": 1,
            "num_samples": 2,
            "log_every": 1,
            "checkpoint_every": 2,
        }
        return TrainConfig(**{**fields, **changes})

    return make


@pytest.fixture
def kill_in_step_3():
    """Train a configuration, with a checkpoint every 2 steps, in a process that is killed in its step 3."""

    def run(config):
        killed = subprocess.run([sys.executable, "-c", KILLED_RUN, json.dumps(config.to_dict())], capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        assert newest_checkpoint(Path(config.output_dir) / "checkpoints").name == "step-00000002"

    return run


@pytest.fixture
def in_processes():
    """Run a Python script in 2 processes that speak to each other on the CPU; their outputs, errors and exit codes."""

    def run(script, *arguments, processes=2, **environment):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        shared = {**shared, "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1", **environment}
        running = [
            subprocess.Popen(
                [sys.executable, "-c", script, *arguments],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        try:
            ended = [(process.communicate(timeout=PROCESS_SECONDS), process.returncode) for process in running]
            return [SimpleNamespace(out=out, errors=errors, code=code) for (out, errors), code in ended]
        finally:
            for process in running:
                process.kill()

    return run


@pytest.fixture
def train_in_processes(in_processes):
    """Train a configuration in 2 processes on the CPU; every one of them must come to the end."""

    def run(config, **environment):
        results = in_processes(WHOLE_RUN, json.dumps(config.to_dict()), **environment)
        assert [one.code for one in results] == [0, 0], results[0].errors + results[1].errors

    return run


@pytest.fixture
def train_with_a_bad_image(in_processes):
    """Train a configuration in 2 processes, the second of which has a bad image in its forward pass `number` (from 0).

    They print the number of steps, or the error that ended them.
    """
    return lambda config, number: in_processes(SPOILT_RUN, json.dumps(config.to_dict()), str(number))


@pytest.fixture
def stored(tiny_run, tmp_path):
    return checkpoint(tiny_run, tmp_path / "stored"), str(tmp_path / "stored")
