"""Official MaskFormer checkpoints: read, write, and give the same numbers as transformers."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DetrConfig, MaskFormerConfig, MaskFormerForInstanceSegmentation, ResNetConfig, SwinConfig

from hf_maskformer import HfMaskFormerConfig, HfMaskFormerForUniversalSegmentation, HfMaskFormerModel
from hf_maskformer.model.official import rename_official_weights, translate_config
from hf_maskformer.model.official_maskformer import MASKFORMER

STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONES = {
    "resnet-basic": lambda: ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1], layer_type="basic", out_features=STAGES
    ),
    "resnet-bottleneck": lambda: ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], out_features=STAGES
    ),
    "swin": lambda: SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 2, 1], num_heads=[2, 2, 2, 2], window_size=4, out_features=STAGES
    ),
}


def official_model(backbone: str, *, decoder_dim: int = 48, seed: int = 0) -> MaskFormerForInstanceSegmentation:
    torch.manual_seed(seed)
    config = MaskFormerConfig(
        backbone_config=BACKBONES[backbone](),
        decoder_config=DetrConfig(
            d_model=decoder_dim, decoder_layers=3, decoder_ffn_dim=40, decoder_attention_heads=4, num_queries=11
        ),
        fpn_feature_size=32,
        mask_feature_size=24,
        num_labels=5,
        no_object_weight=0.2,
        mask_weight=15.0,
        dice_weight=2.0,
        cross_entropy_weight=1.5,
    )
    model = MaskFormerForInstanceSegmentation(config).eval()
    for module in model.modules():  # transformers initialises batch-norm scales near 0, which would hide differences
        if isinstance(module, torch.nn.LayerNorm | torch.nn.GroupNorm | torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def targets(sizes=(3, 5), height=76, width=100, seed=1):
    generator = torch.Generator().manual_seed(seed)
    masks = [(torch.rand(n, height, width, generator=generator) > 0.6) for n in sizes]
    labels = [torch.randint(0, 5, (n,), generator=generator) for n in sizes]
    return masks, labels


@pytest.fixture(params=list(BACKBONES))
def pair(request, tmp_path):
    official = official_model(request.param)
    official.save_pretrained(tmp_path)
    return official, HfMaskFormerForUniversalSegmentation.from_pretrained(tmp_path).eval(), tmp_path


@pytest.mark.parametrize("size", [(64, 64), (76, 100), (97, 131)])
def test_logits_equal_transformers(pair, size):
    official, ours, _ = pair
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, got = official(pixels), ours(pixels)
        masked = ours(pixels, pixel_mask=torch.ones(2, *size, dtype=torch.int64))
    assert expected.masks_queries_logits.std() > 0.01
    torch.testing.assert_close(got.class_queries_logits, expected.class_queries_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.masks_queries_logits, expected.masks_queries_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(masked.masks_queries_logits, expected.masks_queries_logits, atol=1e-4, rtol=0)


def test_loss_equals_transformers(pair):
    official, ours, _ = pair
    masks, labels = targets()
    pixels = torch.randn(2, 3, 76, 100, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = official(pixels, mask_labels=[m.float() for m in masks], class_labels=labels).loss
        got = ours(pixels, mask_labels=masks, class_labels=labels).loss
    assert not ours.config.loss_auxiliary
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_gradients_equal_transformers(pair):
    official, ours, _ = pair
    masks, labels = targets()
    pixels = torch.randn(2, 3, 76, 100, generator=torch.Generator().manual_seed(3))
    official(pixels, mask_labels=[m.float() for m in masks], class_labels=labels).loss.backward()
    ours(pixels, mask_labels=masks, class_labels=labels).loss.backward()
    torch.testing.assert_close(
        ours.model.class_head.projection.weight.grad, official.class_predictor.weight.grad, atol=1e-4, rtol=1e-3
    )
    torch.testing.assert_close(
        ours.model.pixel_decoder.mask_projection.weight.grad,
        official.model.pixel_level_module.decoder.mask_projection.weight.grad,
        atol=1e-4,
        rtol=1e-3,
    )


def test_every_weight_is_used_and_none_is_missing(pair):
    _, ours, folder = pair
    swin = ours.config.backbone_config.model_type == "swin"
    renamed = rename_official_weights(load_file(folder / "model.safetensors"), MASKFORMER, swin=swin)
    _, report = HfMaskFormerForUniversalSegmentation.from_pretrained(
        None, config=ours.config, state_dict=renamed, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]


def test_our_save_of_an_official_checkpoint_loads_without_a_missing_key(pair, tmp_path):
    _, ours, _ = pair
    ours.save_pretrained(tmp_path / "ours")
    again, report = HfMaskFormerForUniversalSegmentation.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(pixels).masks_queries_logits, ours(pixels).masks_queries_logits)


def test_save_official_is_read_by_plain_transformers_without_a_log_line(pair, tmp_path):
    official, ours, _ = pair
    target = tmp_path / "official_again"
    ours.save_official(target)
    pixels = torch.randn(1, 3, 76, 100, generator=torch.Generator().manual_seed(5))
    torch.save(pixels, tmp_path / "pixels.pt")
    script = (
        "import sys, torch\n"
        "from transformers import MaskFormerForInstanceSegmentation\n"
        "model, report = MaskFormerForInstanceSegmentation.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not report['missing_keys'] and not report['unexpected_keys'], report\n"
        "with torch.no_grad():\n"
        "    out = model.eval()(torch.load(sys.argv[2], weights_only=True))\n"
        "torch.save({'m': out.masks_queries_logits, 'c': out.class_queries_logits}, sys.argv[3])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(target), str(tmp_path / "pixels.pt"), str(tmp_path / "out.pt")],
        capture_output=True,
        text=True,
        env={**_quiet_environment()},
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.strip() == ""
    with torch.no_grad():
        expected = official(pixels)
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(got["m"], expected.masks_queries_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(got["c"], expected.class_queries_logits, atol=1e-4, rtol=0)


def _quiet_environment() -> dict[str, str]:
    import os

    return {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}


def test_save_official_restores_every_tensor_of_the_file(pair, tmp_path):
    _, ours, folder = pair
    ours.save_official(tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert set(after) == set(before)
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], atol=0, rtol=0)


def test_no_input_projection_when_the_widths_agree(tmp_path):
    official = official_model("resnet-basic", decoder_dim=32)
    official.save_pretrained(tmp_path)
    ours = HfMaskFormerForUniversalSegmentation.from_pretrained(tmp_path).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(pixels).masks_queries_logits, official(pixels).masks_queries_logits, atol=1e-4, rtol=0
        )


def test_base_model_reads_an_official_checkpoint(pair):
    _, ours, folder = pair
    base = HfMaskFormerModel.from_pretrained(folder).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(base(pixels).masks_queries_logits, ours(pixels).masks_queries_logits)


def test_both_swin_spellings_are_read():
    official = {"model_type": "maskformer", "backbone_config": {"model_type": "maskformer-swin", "embed_dim": 96}}
    for spelling in ("swin", "maskformer-swin"):
        official["backbone_config"]["model_type"] = spelling
        ours = translate_config(official)["backbone_config"]
        assert ours["model_type"] == "swin"
        assert ours["out_features"] == STAGES


def test_untranslatable_field_is_an_error():
    with pytest.raises(ValueError, match=r"'output_auxiliary_logits' = True"):
        translate_config({"model_type": "maskformer", "output_auxiliary_logits": True})
    with pytest.raises(ValueError, match=r"'brand_new_field' = 3"):
        translate_config({"model_type": "maskformer", "brand_new_field": 3})


def test_unknown_weight_is_an_error():
    with pytest.raises(ValueError, match=r"'surprise\.weight'"):
        rename_official_weights({"surprise.weight": torch.zeros(1)}, MASKFORMER, swin=False)


def test_overrides_and_task_of_an_official_checkpoint(pair):
    _, ours, folder = pair
    assert ours.config.task == "panoptic"
    semantic = HfMaskFormerForUniversalSegmentation.from_pretrained(folder, task="semantic", loss_auxiliary=True)
    assert semantic.config.task == "semantic"
    assert semantic.config.loss_auxiliary
    assert ours.config.loss_mask_weight == ours.config.matcher_mask_cost == 15.0


def test_new_label_set_makes_new_heads(pair):
    _, _, folder = pair
    model = HfMaskFormerForUniversalSegmentation.from_pretrained(
        folder, id2label={0: "a", 1: "b"}, ignore_mismatched_sizes=True
    )
    assert model.model.class_head.projection.weight.shape[0] == 3
    assert model.config.thing_label_ids == [0, 1]


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"pixel_decoder": "fpn_transformer"}, "pixel_decoder"),
        ({"mask_head_layers": 2}, "mask_head_layers"),
        ({"pixel_decoder_dim": 40}, "pixel_decoder_dim"),
        ({"backbone_config": {"model_type": "convnext", "out_features": STAGES}}, "convnext"),
    ],
)
def test_save_official_names_the_part_it_cannot_write(overrides, part, tmp_path):
    fields = {"backbone_config": BACKBONES["resnet-basic"](), "pixel_decoder_dim": 32, "query_decoder_layers": 1}
    model = HfMaskFormerForUniversalSegmentation(HfMaskFormerConfig(**{**fields, **overrides}))
    with pytest.raises(ValueError, match=part):
        model.save_official(tmp_path)


def test_other_model_type_and_pickle_only_and_empty_directories_are_refused(pair, tmp_path):
    _, _, folder = pair
    with pytest.raises(ValueError, match=r"no config\.json"):
        HfMaskFormerForUniversalSegmentation.from_pretrained(_made(tmp_path / "empty"))
    other = _made(tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"model_type": "segformer"}))
    with pytest.raises(ValueError, match="'segformer'"):
        HfMaskFormerForUniversalSegmentation.from_pretrained(other)
    pickled = _made(tmp_path / "pickled")
    (pickled / "config.json").write_text((folder / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"not opened")
    with pytest.raises(ValueError, match="only as a pickle"):
        HfMaskFormerForUniversalSegmentation.from_pretrained(pickled)


def test_sharded_official_checkpoint(tmp_path):
    official = official_model("resnet-basic")
    official.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:50], "model-00002-of-00002.safetensors": names[50:]}
    for file, members in parts.items():
        save_file({name: weights[name] for name in members}, tmp_path / file, {"format": "pt"})
    weight_map = {name: file for file, members in parts.items() for name in members}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    ours = HfMaskFormerForUniversalSegmentation.from_pretrained(tmp_path).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(pixels).masks_queries_logits, official(pixels).masks_queries_logits, atol=1e-4, rtol=0
        )


def _made(folder):
    folder.mkdir()
    return folder
