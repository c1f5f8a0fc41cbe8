"""Parts that are not trained stay as they are, statistics included, over runs and their resumption."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_maskformer.data.load import load
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.training.fine_tuning import freeze_parts
from hf_maskformer.training.setup import build_model
from hf_maskformer.training.train import train
from training.stored_models import config_of, state


def test_frozen_parts_stay_as_they_are(tiny_run, tmp_path, stored):
    """Weights, and the statistics of their batch norms, over a run with an evaluation in its middle."""
    _, folder = stored
    fields = {"init_from": folder, "config_overrides": {}, "evaluations": 2, "freeze": ("backbone", "class_head")}
    whole = tiny_run("whole", **fields)
    before = state(build_model(whole, load("scenes", length=1, image_size=64), None)[0])
    train(whole)
    after = load_file(tmp_path / "whole" / "final" / "model.safetensors")
    frozen = [name for name in before if name.startswith("model.backbone.")]
    assert any(name.endswith("running_mean") for name in frozen)
    for name in frozen:
        assert torch.equal(after[name], before[name]), name
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    for part in ("pixel_decoder", "query_decoder", "mask_head"):
        assert any(name.startswith(f"model.{part}.") for name in moved), part
    groups = json.loads((tmp_path / "whole" / "checkpoints" / "step-00000004" / "state.json").read_text())
    names = [name for group in groups["optimizer"]["param_groups"] for name in group["parameter_names"]]
    assert not any(name.startswith(("model.backbone.", "model.class_head.")) for name in names)


def test_a_frozen_run_is_resumed_to_the_same_weights(tiny_run, tmp_path):
    options = {"freeze": ("backbone",), "evaluations": 1, "val_split": None}
    train(tiny_run("whole", **options))
    cut = tiny_run("cut", **options)
    train(cut)
    for folder in ("checkpoints/step-00000004", "best", "final"):
        shutil.rmtree(tmp_path / "cut" / folder)
    cut.resume = True
    train(cut)
    expected, found = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_batch_norms_of_a_frozen_part_stay_in_eval_mode(tiny_run):
    model = HfMaskFormerForUniversalSegmentation(config_of(tiny_run))
    freeze_parts(model, ["backbone"])
    model.train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(module.training for module in norms)
    assert model.model.pixel_decoder.training


def test_an_unknown_part_is_refused_with_the_parts_there_are(tiny_run):
    model = HfMaskFormerForUniversalSegmentation(config_of(tiny_run))
    parts = "backbone, pixel_decoder, query_decoder, class_head, mask_head, pixel_classifier"
    with pytest.raises(ValueError, match=f"freeze names 'neck'; the parts of this model are {parts}"):
        freeze_parts(model, ["neck"])


def test_a_model_that_is_frozen_whole_is_refused(tiny_run):
    model = HfMaskFormerForUniversalSegmentation(config_of(tiny_run, loss_pixel_weight=0.0))
    names = ["backbone", "pixel_decoder", "query_decoder", "class_head", "mask_head"]
    with pytest.raises(ValueError, match=r"freeze backbone, .*mask_head leaves no part to train"):
        freeze_parts(model, names)
