"""Where the files of a checkpoint are: subfolders, variants, adapters; and the forms of `config` beside them."""

import json

import pytest
import torch
from transformers import (
    AutoModelForUniversalSegmentation,
    MaskFormerConfig,
    ResNetConfig,
)
from transformers.utils.import_utils import is_peft_available

from hf_maskformer import HfMaskFormerConfig, HfMaskFormerForUniversalSegmentation
from model import variant_tester as tester
from official_peer import tiny_maskformer

KINDS = ("ours", "official")
load = HfMaskFormerForUniversalSegmentation.from_pretrained


def made(kind):
    """A tiny model of ours, or of transformers'."""
    torch.manual_seed(0)
    if kind == "ours":
        return tester.build(tester.tiny("maskformer-light")).eval()
    return tiny_maskformer().eval()


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return made(request.param)


def logits(model):
    with torch.no_grad():
        return model(torch.ones(1, 3, 64, 64)).class_queries_logits


def test_a_subfolder_of_a_directory(model, tmp_path):
    model.save_pretrained(tmp_path / "sub")
    loaded = load(tmp_path, subfolder="sub").eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="has no subfolder 'other'"):
        load(tmp_path, subfolder="other")
    with pytest.raises(ValueError, match=r"no config\.json; it holds \['sub'\]"):
        load(tmp_path)


@pytest.mark.parametrize("shard_size", ["1GB", "50KB"])
def test_a_variant_in_one_file_and_in_shards(model, tmp_path, shard_size):
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.fp16.json").is_file() == (shard_size == "50KB")
    loaded, report = load(tmp_path, variant="fp16", output_loading_info=True)
    assert not report["missing_keys"]
    torch.testing.assert_close(logits(loaded.eval()), logits(model), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"no weights \(model\.safetensors\)"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"no weights \(model\.bf16\.safetensors\)"):
        load(tmp_path, variant="bf16")


@pytest.mark.parametrize("use_safetensors", [None, False])
def test_a_pickled_variant_is_not_opened(model, tmp_path, use_safetensors):
    model.config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.fp16.bin").write_bytes(b"not opened")
    with pytest.raises(ValueError, match=r"only as a pickle \(pytorch_model\.fp16\.bin\)"):
        load(tmp_path, variant="fp16", use_safetensors=use_safetensors)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_both_names_of_the_type(model, tmp_path, name):
    model.save_pretrained(tmp_path)
    assert load(tmp_path, **{name: torch.float16}).dtype == torch.float16
    assert load(tmp_path, **{name: "auto"}).dtype == torch.float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of an official checkpoint."""
    folder = tmp_path_factory.mktemp("official")
    made("official").save_pretrained(folder)
    return folder


class TestConfig:
    @pytest.mark.parametrize("form", [str, lambda folder: folder, MaskFormerConfig.from_pretrained])
    def test_paths_and_official_objects(self, folder, form):
        config = form(folder)
        loaded = load(folder, config=config, task="semantic", torch_dtype=torch.float16).eval()
        assert isinstance(loaded.config, HfMaskFormerConfig)
        assert loaded.config.name_or_path == loaded.name_or_path == str(folder)
        assert (loaded.config.num_queries, loaded.config.task, loaded.dtype) == (5, "semantic", torch.float16)
        torch.testing.assert_close(logits(load(folder, config=config)), logits(load(folder)))

    def test_our_object_is_left_alone(self, folder):
        config = HfMaskFormerConfig.from_pretrained(folder, num_labels=7)
        before = config.to_dict()
        assert load(folder, config=config, ignore_mismatched_sizes=True).config.num_labels == 7
        assert config.to_dict() == before

    @pytest.mark.parametrize("config", [3, {"model_type": "detr"}, ResNetConfig()])
    def test_anything_else_is_refused(self, folder, config):
        with pytest.raises(ValueError, match="config must be a path, a Hub id, an HfMaskFormerConfig or an official"):
            load(folder, config=config)


@pytest.mark.parametrize("model_type", ["maskformer", "mask2former"])
def test_a_label_255_of_an_official_config_is_no_contradiction(model_type):
    """The official models never read the value that is ignored."""
    official = {"model_type": model_type, "id2label": {str(label): f"class {label}" for label in range(300)}}
    assert HfMaskFormerConfig.from_dict(official).ignore_index is None
    assert HfMaskFormerConfig.from_dict({**official, "id2label": {"0": "a"}}).ignore_index == 255


@pytest.mark.skipif(not is_peft_available(), reason="peft is not installed")
class TestAdapters:
    @pytest.fixture(params=KINDS)
    def saved(self, request, tmp_path):
        """An adapted model, the directory of its adapter, and the kind of its base."""
        from peft import LoraConfig, get_peft_model

        made(request.param).save_pretrained(tmp_path / "base")
        settings = LoraConfig(target_modules=["query", "value"], r=4, init_lora_weights=False)
        adapted = get_peft_model(load(tmp_path / "base"), settings).eval()
        adapted.save_pretrained(tmp_path / "adapter")
        return adapted, tmp_path / "adapter", request.param

    def test_the_base_is_loaded_and_the_adapter_put_on(self, saved, tmp_path):
        adapted, folder, kind = saved
        loaded = load(folder).eval()
        assert type(loaded) is HfMaskFormerForUniversalSegmentation
        torch.testing.assert_close(logits(loaded), logits(adapted))
        assert not torch.equal(logits(loaded), logits(load(tmp_path / "base").eval()))
        if kind == "ours":
            automatic = AutoModelForUniversalSegmentation.from_pretrained(folder).eval()
            assert torch.equal(logits(automatic), logits(loaded))

    def test_a_pickled_adapter_is_not_opened(self, saved):
        _, folder, _ = saved
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        with pytest.raises(ValueError, match=r"adapter without adapter_model\.safetensors"):
            load(folder)

    def test_an_adapter_without_a_base_says_so(self, saved):
        _, folder, _ = saved
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
        with pytest.raises(ValueError, match="base_model_name_or_path None: it must be"):
            load(folder)
