"""Adapters in our loop: what is trained, what is saved, and that a resumed run goes on exactly."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_maskformer.data.load import load
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.presets import image_processor_for, preset
from hf_maskformer.training import lora
from hf_maskformer.training.lora import add_adapters, load_adapters, plain_weights, save_apart, save_plain
from hf_maskformer.training.train import train


@pytest.fixture
def model(tiny_run):
    torch.manual_seed(1)
    spec = load("scenes", length=1, image_size=64).label_spec
    fields = {"id2label": spec.id2label, "thing_label_ids": list(spec.thing_label_ids), "task": "panoptic"}
    return HfMaskFormerForUniversalSegmentation(
        preset("maskformer-light", **tiny_run().config_overrides, **fields, loss_pixel_weight=1.0)
    )


@pytest.fixture
def stored(model, tmp_path):
    model.save_pretrained(tmp_path / "stored")
    image_processor_for(model.config).save_pretrained(tmp_path / "stored")
    return str(tmp_path / "stored")


@pytest.fixture
def adapted(model):
    pytest.importorskip("peft")
    add_adapters(model, rank=2, alpha=4, targets=["backbone", "query_decoder"])
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter)  # they start at zero, where an adapter changes nothing
    return model


def outputs(model):
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(pixel_values=pixels).masks_queries_logits


def test_adapters_heads_and_queries_are_trained_and_nothing_else(adapted):
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    whole = {name for name in trained if ".lora_" not in name}
    parts = {name.removeprefix("model.").split(".")[0] for name in whole}
    assert parts == {"class_head", "mask_head", "pixel_classifier", "query_decoder"}
    assert {name for name in whole if "query_decoder" in name} == {"model.query_decoder.query_positions.weight"}
    adapters = trained - whole
    assert any(name.startswith("model.backbone.") for name in adapters)
    assert any(".cross_attention.value.lora_A." in name for name in adapters)
    assert not any(name.startswith("model.pixel_decoder.") for name in adapters)
    adapted.train()
    assert not any(module.training for module in adapted.modules() if isinstance(module, nn.BatchNorm2d))


def test_new_adapters_change_nothing(model):
    pytest.importorskip("peft")
    before = outputs(model)
    add_adapters(model, rank=2, alpha=None, targets=["backbone", "pixel_decoder", "query_decoder"])
    assert torch.equal(outputs(model), before)


def test_merged_weights_give_the_same_outputs_without_peft(adapted, tmp_path):
    save_plain(adapted, tmp_path / "merged")
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert not any("lora" in name or "base_layer" in name for name in names)
    loaded = HfMaskFormerForUniversalSegmentation.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(loaded), outputs(adapted), rtol=1e-4, atol=1e-4)


def test_what_is_saved_apart_comes_back_exactly(adapted, tmp_path):
    save_apart(adapted, tmp_path / "model", tmp_path)
    loaded = HfMaskFormerForUniversalSegmentation.from_pretrained(tmp_path / "model")
    assert not torch.equal(outputs(loaded), outputs(adapted))
    add_adapters(loaded, rank=2, alpha=4, targets=["backbone", "query_decoder"])
    load_adapters(loaded, tmp_path)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in adapted.state_dict().items())
    assert torch.equal(outputs(loaded), outputs(adapted))
    other = HfMaskFormerForUniversalSegmentation.from_pretrained(tmp_path / "model")
    add_adapters(other, rank=2, alpha=4, targets=["query_decoder"])
    with pytest.raises(ValueError, match=r"adapters\.safetensors holds other adapters than the model: .*backbone"):
        load_adapters(other, tmp_path)
    with pytest.raises(ValueError, match="the run was begun without lora_rank"):
        load_adapters(other, tmp_path / "model")


def test_a_model_without_adapters_has_no_other_weights(model):
    assert plain_weights(model) is None


def test_a_run_trains_adapters_and_publishes_merged_weights(stored, tiny_run, tmp_path):
    pytest.importorskip("peft")
    options = {"init_from": stored, "config_overrides": {}, "lora_rank": 2, "ema_decay": 0.5, "evaluations": 2}
    whole = tiny_run("whole", **options)
    train(whole)
    final = load_file(tmp_path / "whole" / "final" / "model.safetensors")
    before = load_file(tmp_path / "stored" / "model.safetensors")
    assert final.keys() == before.keys()
    changed = {name for name, value in before.items() if not torch.equal(value, final[name])}
    for part in ("backbone", "pixel_decoder", "query_decoder", "class_head", "mask_head"):
        assert any(name.startswith(f"model.{part}.") for name in changed), part
    assert not any("norm" in name for name in changed)  # neither weights nor statistics
    HfMaskFormerForUniversalSegmentation.from_pretrained(tmp_path / "whole" / "best")

    cut = tiny_run("cut", **options)
    train(cut)
    for folder in ("checkpoints/step-00000004", "best", "final"):
        shutil.rmtree(tmp_path / "cut" / folder)
    cut.resume = True
    train(cut)
    found = load_file(tmp_path / "cut" / "final" / "model.safetensors")
    assert all(torch.equal(final[name], found[name]) for name in final)


def test_a_missing_package_is_named_before_the_first_step(stored, tiny_run, monkeypatch):
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    config = tiny_run(init_from=stored, config_overrides={}, lora_rank=2)
    with pytest.raises(ValueError, match=r"peft is not installed: pip install hf_maskformer\[peft\]"):
        train(config)


def test_unknown_targets_are_refused(model):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"lora_targets names 'neck'; the parts of this model are backbone, pixel_"):
        add_adapters(model, rank=2, alpha=None, targets=["neck"])


@pytest.mark.parametrize("part", ["class_head", "mask_head", "pixel_classifier"])
def test_a_target_that_is_trained_whole_is_refused(model, part):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=rf"lora_targets names '{part}', which is trained whole"):
        add_adapters(model, rank=2, alpha=None, targets=["backbone", part])
