"""Compiled parts: the weights of an eager run, under the same names, without compiling again at each step."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from hf_maskformer.training import compilation
from hf_maskformer.training.train import train

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++")


@needs_compiler
@pytest.mark.slow
def test_a_compiled_run_ends_with_the_eager_runs_weights(tiny_run):
    overrides = {**tiny_run().config_overrides, "query_decoder_dropout": 0.0}
    found, graphs = {}, []
    for name in ("eager", "compiled"):
        config = tiny_run(name, max_steps=2, config_overrides=overrides, schedule="constant", max_grad_norm=0.1)
        config.compile, config.checkpoint_every = name == "compiled", 1
        counters.clear()
        train(config)
        graphs.append(counters["stats"]["unique_graphs"])
        found[name] = load_file(Path(config.output_dir) / "final" / "model.safetensors")
    assert graphs[0] == 0
    assert graphs[1] > 0
    assert set(found["compiled"]) == set(found["eager"])
    for name, value in found["eager"].items():
        torch.testing.assert_close(found["compiled"][name], value, rtol=1e-4, atol=1e-4, msg=name)


@needs_compiler
@pytest.mark.slow
def test_no_step_but_the_first_compiles(tiny_run, monkeypatch):
    """Evaluations in between have other sizes and modes."""
    from hf_maskformer.training import train as train_module

    def counted(*args, step, **keywords):
        values = training_step(*args, step=step, **keywords)
        graphs.append(counters["stats"]["unique_graphs"])
        return values

    graphs, training_step = [], train_module.training_step
    monkeypatch.setattr(train_module, "training_step", counted)
    train(tiny_run(compile=True, evaluations=4, max_steps=4))
    assert graphs[0] > 0
    assert set(graphs) == {graphs[0]}


def test_a_platform_without_compiler_is_named_before_the_first_step(tiny_run, monkeypatch):
    def broken(function):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nfurther lines")

    monkeypatch.setattr(compilation.torch, "compile", broken)
    with pytest.raises(ValueError, match=r"torch\.compile does not work here for cpu: InvalidCxxCompiler: No working"):
        train(tiny_run(compile=True))
