"""HfMaskFormerConfig: what it refuses and how, overrides, the round trip through JSON."""

import json
import logging

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, ResNetConfig

from hf_maskformer.model import configuration_hf_maskformer as configuration
from hf_maskformer.model.configuration_hf_maskformer import AUTO_MAP, HfMaskFormerConfig
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.presets import list_presets, preset
from model import variant_tester as tester

LABELS = {0: "road", 1: "tree", 2: "car"}


@pytest.fixture
def log(caplog):
    """What the configuration's logger says; transformers' loggers do not reach the root logger."""
    configuration.logger.addHandler(caplog.handler)
    yield caplog
    configuration.logger.removeHandler(caplog.handler)


def saved(tmp_path, **fields):
    HfMaskFormerConfig(id2label=LABELS, thing_label_ids=[2], **fields).save_pretrained(tmp_path)
    return tmp_path


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("num_querys", "num_queries"),
        ("pixel_decoder_layer", "pixel_decoder_layers"),
        ("thing_ids", "thing_label_ids"),
        ("tasks", "task"),
    ],
)
def test_an_unknown_keyword_names_the_nearest_field(wrong, nearest):
    with pytest.raises(ValueError, match=rf"no field '{wrong}' \(given: 3\); the nearest field is '{nearest}'"):
        HfMaskFormerConfig(**{wrong: 3})


@pytest.mark.parametrize("name", ["temperature", "max_length", "num_beams", "use_cache", "is_decoder"])
def test_generation_settings_are_unknown_too(name):
    with pytest.raises(ValueError, match=f"no field '{name}'"):
        HfMaskFormerConfig(**{name: 3})


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("pixel_decoder", "unet", "fpn_transformer"),
        ("query_decoder", "masked_typo", "standard"),
        ("task", "detection", "panoptic"),
        ("matcher", "greedy", "hungarian"),
        ("criterion_resolution", "half", "prediction"),
        ("class_activation", "tanh", "sigmoid"),
        ("backbone_neck", "fpn", "pyramid"),
    ],
)
def test_an_unknown_part_names_field_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(StrictDataclassFieldValidationError) as error:
        HfMaskFormerConfig(**{field: value})
    for text in (field, value, allowed):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"), [("num_queries", "many"), ("num_queries", 1.5), ("loss_mask_weight", "x")]
)
def test_a_value_of_the_wrong_type_is_refused(field, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        HfMaskFormerConfig(**{field: value})


def test_a_wrong_value_is_refused_when_assigned_later():
    config = HfMaskFormerConfig()
    with pytest.raises(StrictDataclassFieldValidationError, match="pixel_decoder"):
        config.pixel_decoder = "unet"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": {1: "road", 2: "car"}}, r"0\.\.K-1 without a gap, got \[1, 2\]"),
        ({"id2label": {"road": "0"}}, r"id2label must have integers as keys, got \['road'\]"),
        ({"id2label": {}}, r"id2label must have the ids 0\.\.K-1 without a gap, got \[\]"),
        ({"num_labels": 0}, r"id2label must have the ids 0\.\.K-1 without a gap, got \[\]"),
        ({"num_labels": 300}, r"ignore_index 255 is also the label 'LABEL_255'.* outside 0\.\.299, or None"),
        ({"id2label": LABELS, "thing_label_ids": [3]}, r"thing_label_ids contains 3, allowed .*\[0, 1, 2\]"),
        ({"query_decoder_dim": 36}, r"query_decoder_dim \(36\) must be a multiple of query_decoder_heads \(8\)"),
        ({"pixel_decoder_dim": 12, "pixel_decoder_heads": 8}, r"pixel_decoder_dim \(12\)"),
        ({"query_decoder_dim": 6, "query_decoder_heads": 2}, "multiples of 4"),
        ({"image_size": [512]}, r"image_size must be 2 positive integers, got \[512\]"),
        ({"image_size": [512, 0]}, "image_size"),
        ({"spatial_dims": 3, "image_size": [8, 8, 8]}, "spatial_dims is 3"),
        ({"class_activation": "sigmoid"}, "class_activation 'sigmoid'"),
        ({"matcher": "fixed", "task": "panoptic"}, "task must be 'semantic'"),
        ({"matcher": "fixed", "task": "semantic", "id2label": LABELS, "num_queries": 2}, r"num_queries \(2\)"),
        ({"backbone": "timm/resnet18", "backbone_config": {"model_type": "resnet"}}, "not both"),
        ({"backbone": "resnet18"}, r"'timm/<name>', got 'resnet18'"),
        ({"backbone_config": {"model_type": "no_such_net"}}, "model_type 'no_such_net'"),
        ({"backbone_config": {"depths": [1, 1]}}, "model_type None"),
        (
            {"num_channels": 1, "backbone_config": {"model_type": "resnet", "num_channels": 4}},
            "num_channels is 1, .* 4",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HfMaskFormerConfig(**fields)


def test_contradictions_made_later_are_found_on_save_and_by_the_model(tmp_path):
    config = tester.tiny("maskformer-light")
    config.thing_label_ids = [7]
    with pytest.raises(Exception, match="thing_label_ids contains 7"):
        config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="thing_label_ids contains 7"):
        HfMaskFormerForUniversalSegmentation(config)


def test_labels_that_are_no_table_are_refused(tmp_path):
    # Some versions of transformers check the type of this field before we do.
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=r"id2label.*\['road', 'car'\]"):
        HfMaskFormerConfig(id2label=["road", "car"])
    with pytest.raises(ValueError, match=r"id2label must be a dict of label id -> name, got \['road', 'car'\]"):
        HfMaskFormerConfig.from_pretrained(saved(tmp_path), id2label=["road", "car"])


# --- labels ----------------------------------------------------------------------------------------------------------


def test_label2id_is_the_inverse_of_id2label():
    assert HfMaskFormerConfig(id2label=LABELS).label2id == {"road": 0, "tree": 1, "car": 2}
    assert HfMaskFormerConfig().label2id == {"LABEL_0": 0, "LABEL_1": 1}
    stale = HfMaskFormerConfig(id2label=LABELS, label2id={"a": 0, "b": 1, "c": 2})
    assert stale.label2id == {"road": 0, "tree": 1, "car": 2}


def test_num_labels_makes_generic_names():
    config = HfMaskFormerConfig(num_labels=4)
    assert config.id2label == {index: f"LABEL_{index}" for index in range(4)}
    assert config.num_labels == 4


@pytest.mark.parametrize(("task", "things"), [("semantic", []), ("instance", [0, 1, 2]), ("panoptic", [0, 1, 2])])
def test_things_follow_the_task_unless_they_are_given(task, things):
    assert HfMaskFormerConfig(id2label=LABELS, task=task).thing_label_ids == things
    assert HfMaskFormerConfig(id2label=LABELS, task=task, thing_label_ids=[1]).thing_label_ids == [1]
    assert HfMaskFormerConfig(id2label=LABELS, task=task, thing_label_ids=[]).thing_label_ids == []


@pytest.mark.parametrize("override", [{"id2label": {0: "x"}}, {"num_labels": 1}])
def test_new_labels_reset_the_thing_ids_with_a_warning(tmp_path, log, override):
    config = HfMaskFormerConfig.from_pretrained(saved(tmp_path), **override)
    assert config.num_labels == 1
    assert config.thing_label_ids == [0]
    assert len(config.label2id) == 1
    assert "thing_label_ids" in log.text


def test_new_labels_with_their_thing_ids_are_taken_without_a_warning(tmp_path, log):
    config = HfMaskFormerConfig.from_pretrained(saved(tmp_path), id2label={0: "x", 1: "y"}, thing_label_ids=[1])
    assert (config.num_labels, config.thing_label_ids, config.label2id) == (2, [1], {"x": 0, "y": 1})
    assert not log.records


def test_the_same_number_of_labels_changes_nothing(tmp_path, log):
    config = HfMaskFormerConfig.from_pretrained(saved(tmp_path), num_labels=3)
    assert config.id2label == LABELS
    assert config.thing_label_ids == [2]
    assert not log.records


@pytest.mark.parametrize("same", [LABELS, {str(label): name for label, name in LABELS.items()}])
def test_the_same_labels_change_nothing(tmp_path, log, same):
    config = HfMaskFormerConfig.from_pretrained(saved(tmp_path), id2label=same)
    assert (config.id2label, config.thing_label_ids) == (LABELS, [2])
    assert not log.records


@pytest.mark.parametrize("same", [{"num_labels": 2}, {"id2label": {0: "LABEL_0", 1: "LABEL_1"}}])
def test_the_two_labels_that_no_file_names_change_nothing_either(tmp_path, log, same):
    HfMaskFormerConfig(thing_label_ids=[1]).save_pretrained(tmp_path)
    assert "id2label" not in json.loads((tmp_path / "config.json").read_text())
    assert HfMaskFormerConfig.from_pretrained(tmp_path, **same).thing_label_ids == [1]
    assert not log.records


def test_more_labels_than_255_with_nothing_to_ignore():
    assert HfMaskFormerConfig(num_labels=300, ignore_index=None).ignore_index is None
    assert HfMaskFormerConfig(num_labels=300, ignore_index=65535).ignore_index == 65535


# --- loading with overrides ------------------------------------------------------------------------------------------


def test_overrides_are_merged_before_the_checks(tmp_path):
    folder = saved(tmp_path)
    config = HfMaskFormerConfig.from_pretrained(folder, query_decoder_dim=36, query_decoder_heads=9)
    assert (config.query_decoder_dim, config.query_decoder_heads) == (36, 9)
    with pytest.raises(ValueError, match="thing_label_ids contains 5"):
        HfMaskFormerConfig.from_pretrained(folder, thing_label_ids=[5])
    with pytest.raises(StrictDataclassFieldValidationError, match="matcher"):
        HfMaskFormerConfig.from_pretrained(folder, matcher="greedy")


def test_unknown_overrides_are_refused_and_named(tmp_path):
    folder = tmp_path / "model"
    tester.build(tester.tiny("maskformer-light")).save_pretrained(folder)
    for load in (HfMaskFormerConfig.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=r"no field 'nonsense' \(given: 3\)"):
            load(folder, nonsense=3)
    with pytest.raises(TypeError, match="nonsense"):
        HfMaskFormerForUniversalSegmentation.from_pretrained(folder, nonsense=3)


def test_unused_keywords_are_handed_back_when_asked(tmp_path):
    config, unused = HfMaskFormerConfig.from_pretrained(
        saved(tmp_path), num_queries=7, device_map="cpu", return_unused_kwargs=True
    )
    assert config.num_queries == 7
    assert unused == {"device_map": "cpu"}


@pytest.mark.parametrize(
    "keyword",
    [
        *("device_map", "max_memory", "low_cpu_mem_usage", "offload_folder", "offload_state_dict", "offload_buffers"),
        *("use_safetensors", "ignore_mismatched_sizes", "quantization_config", "tp_plan", "tp_size", "device_mesh"),
        *("variant", "weights_only", "output_loading_info", "key_mapping", "use_kernels", "mirror", "adapter_name"),
        *("allow_all_kernels", "disable_mmap", "distributed_config", "fusion_config", "kernel_config", "tqdm_class"),
    ],
)
def test_keywords_about_loading_a_model_are_none_of_the_configuration(tmp_path, keyword):
    folder = saved(tmp_path)
    for load in (HfMaskFormerConfig.from_pretrained, AutoConfig.from_pretrained):
        assert not hasattr(load(folder, **{keyword: "cpu"}), keyword)
    with pytest.raises(ValueError, match=f"no field '{keyword}'"):
        HfMaskFormerConfig(**{keyword: "cpu"})
    with pytest.raises(ValueError, match=f"no field '{keyword}s'"):
        HfMaskFormerConfig.from_pretrained(folder, **{f"{keyword}s": "cpu"})


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_both_names_of_the_type_go_before_the_stored_one(tmp_path, name):
    folder = saved(tmp_path, dtype="float32")
    assert HfMaskFormerConfig.from_pretrained(folder, **{name: "float16"}).dtype == torch.float16
    assert HfMaskFormerConfig.from_pretrained(folder, **{name: "auto"}).dtype == torch.float32


def test_from_dict_leaves_its_argument_alone():
    fields = HfMaskFormerConfig(id2label=LABELS).to_dict()
    before = json.dumps(fields, default=str)
    HfMaskFormerConfig.from_dict(fields, id2label={0: "x"}, num_queries=3)
    assert json.dumps(fields, default=str) == before


def test_part_of_the_backbone_can_be_overridden(tmp_path):
    config = HfMaskFormerConfig.from_pretrained(saved(tmp_path), backbone_config={"depths": [1, 1, 1, 1]})
    assert config.backbone_config.model_type == "resnet"
    assert config.backbone_config.depths == [1, 1, 1, 1]
    assert config.backbone_config.out_features == ["stage1", "stage2", "stage3", "stage4"]


def test_a_file_of_a_newer_format_is_refused(tmp_path):
    path = saved(tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99, "some_new_field": 1}))
    with pytest.raises(ValueError, match=r"format_version 99; this release reads up to 1"):
        HfMaskFormerConfig.from_pretrained(tmp_path)


def test_a_file_with_a_foreign_field_is_refused(tmp_path):
    path = saved(tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_query": 4}))
    with pytest.raises(ValueError, match=r"'num_query'.*'num_queries'"):
        HfMaskFormerConfig.from_pretrained(tmp_path)


def test_another_model_type_is_refused(tmp_path):
    ResNetConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a 'resnet' model"):
        HfMaskFormerConfig.from_pretrained(tmp_path)


# --- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_presets())
def test_round_trip_through_json(name, tmp_path, log):
    config = preset(name, id2label=LABELS, thing_label_ids=[1], task="instance", num_channels=4)
    config.save_pretrained(tmp_path)
    for loaded in (HfMaskFormerConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is HfMaskFormerConfig
        assert {**loaded.to_dict(), "_name_or_path": None} == {**config.to_dict(), "_name_or_path": None}
        assert loaded.id2label == LABELS
    assert not [record for record in log.records if record.levelno >= logging.WARNING]


def test_the_file_names_the_code_of_every_auto_class(tmp_path):
    HfMaskFormerConfig().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["auto_map"] == AUTO_MAP
    assert written["format_version"] == 1
    assert written["model_type"] == "hf_maskformer"


def test_num_channels_reaches_the_backbone():
    assert HfMaskFormerConfig(num_channels=1).backbone_config.num_channels == 1
    assert HfMaskFormerConfig(num_channels=4, backbone="timm/resnet18").backbone_config.num_channels == 4
    assert preset("maskformer-swin-tiny", num_channels=4).backbone_config.num_channels == 4


def test_points_need_masks_that_are_products():
    with pytest.raises(ValueError, match=r"'dot_product' or 'located_dot_product'.*it is 'anchored_dot_product'"):
        HfMaskFormerConfig(
            criterion="points", query_decoder="anchored", mask_head="anchored_dot_product", thing_label_ids=[0]
        )
