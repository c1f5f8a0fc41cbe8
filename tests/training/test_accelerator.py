"""How Accelerate is opened: patience between processes, precisions that have an effect, options told early."""

import pytest
from accelerate.state import AcceleratorState

from hf_maskformer.training import accelerator as module
from hf_maskformer.training import compilation
from hf_maskformer.training import train as train_module
from hf_maskformer.training.accelerator import check_machine, open_accelerator
from hf_maskformer.training.train import train

# Prints how many seconds a process waits for the others.
PATIENCE = """
import torch
from hf_maskformer.training.accelerator import open_accelerator
from hf_maskformer.training.config import TrainConfig

open_accelerator(TrainConfig(max_steps=1, tracker=None))
print(torch.distributed.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout)
"""


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_processes_wait_for_a_long_evaluation_of_the_main_one(tiny_run, monkeypatch):
    given = {}
    monkeypatch.setattr(module, "Accelerator", lambda **options: given.update(options))
    open_accelerator(tiny_run())
    (handler,) = given["kwargs_handlers"]
    assert handler.to_kwargs() == {"timeout": module.LONGEST_WAIT}
    assert module.LONGEST_WAIT.total_seconds() >= 12 * 3600


@pytest.mark.slow
def test_real_processes_have_that_patience(in_processes):
    results = in_processes(PATIENCE)
    assert [one.out.strip() for one in results] == ["1 day, 0:00:00"] * 2, results[0].errors


def test_half_precision_on_the_cpu_is_refused(tiny_run):
    with pytest.raises(ValueError, match=r"mixed_precision is 'fp16', which has no effect on the CPU; use 'bf16'"):
        open_accelerator(tiny_run(mixed_precision="fp16"))
    assert open_accelerator(tiny_run(mixed_precision="bf16")).mixed_precision == "bf16"  # and can be corrected


def test_the_precision_of_a_launch_must_be_the_runs(tiny_run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(
        ValueError, match=r"asks for mixed precision 'bf16', mixed_precision is 'no': give --mixed-prec"
    ):
        open_accelerator(tiny_run())
    assert open_accelerator(tiny_run(mixed_precision="bf16")).mixed_precision == "bf16"
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what a launch says that is not told any
    assert open_accelerator(tiny_run(mixed_precision="bf16")).mixed_precision == "bf16"


def test_what_the_machine_cannot_do_is_said_before_anything_is_made(tiny_run, tmp_path, monkeypatch):
    def broken(function):
        raise RuntimeError("no compiler")

    for name in ("check_publishing", "found_batch_size", "load_splits"):
        monkeypatch.setattr(train_module, name, lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(ValueError, match="fsdp needs more than one process"):
        train(tiny_run(fsdp=True))
    with pytest.raises(ValueError, match="epochs is 2, but the length of streamed data is not known"):
        train(tiny_run(epochs=2, dataset_options={"streaming": True}))
    monkeypatch.setattr(compilation.torch, "compile", broken)
    with pytest.raises(ValueError, match=r"torch\.compile does not work here for cpu: no compiler"):
        train(tiny_run(compile=True))
    assert not (tmp_path / "run").exists()


def test_nothing_is_said_of_what_can_be_done(tiny_run):
    config = tiny_run(epochs=2)
    check_machine(config, open_accelerator(config), sharded=False)
