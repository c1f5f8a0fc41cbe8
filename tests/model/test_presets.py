"""Every preset through the shared tester in a shrunken form; at full width on the meta device only."""

import json
import re
from pathlib import Path

import pytest
import torch

from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.presets import PRESETS, image_processor_for, list_presets, preset
from model import variant_tester as tester

# Millions of parameters that the paper reports (Tables 1 and 3), with the number of labels they were counted with.
PUBLISHED = {
    ("maskformer-r50", 150): 41,
    ("maskformer-r101", 150): 60,
    ("maskformer-swin-tiny", 150): 42,
    ("maskformer-swin-small", 150): 63,
    ("maskformer-swin-base", 150): 102,
    ("maskformer-r50-panoptic", 133): 45,
    ("mask2former-r50", 150): 44,
    ("mask2former-r101", 150): 63,
    ("mask2former-swin-tiny", 150): 47,
    ("mask2former-swin-small", 150): 69,
    ("mask2former-swin-base", 150): 107,
    ("panoptic-segformer-r50", 133): 51,
}


def distinct_shapes() -> list[str]:
    """One preset per shrunken shape: Swin-T, -S and -B differ only in what shrinking removes."""
    shapes = {}
    for name in list_presets():
        fields = tester.tiny(name, threshold=0.5, image_size=[64, 64]).to_dict()
        shapes.setdefault(json.dumps(fields, sort_keys=True, default=str), name)
    return list(shapes.values())


every_preset = pytest.mark.parametrize("name", list_presets())
every_shape = pytest.mark.parametrize("name", distinct_shapes())


@every_shape
def test_training_step(name):
    tester.check_training_step(tester.tiny(name))


@every_shape
def test_initial_weights(name):
    tester.check_initial_weights(tester.tiny(name, initialization="published"))


@every_shape
def test_odd_size(name):
    tester.check_odd_size(tester.tiny(name))


@every_shape
def test_empty_targets(name):
    tester.check_empty_targets(tester.tiny(name))


@every_shape
def test_more_targets_than_queries_is_trained_and_warned_of(name, caplog):
    from hf_maskformer.model import input_checks

    input_checks.logger.warning_once.cache_clear()
    input_checks.logger.addHandler(caplog.handler)
    try:
        tester.check_more_targets_than_queries(tester.tiny(name))
    finally:
        input_checks.logger.removeHandler(caplog.handler)
    assert re.search(r"has 9 targets for [46] queries", caplog.text)  # 4 of 6 queries where 2 are for stuff alone


@every_shape
def test_auxiliary_supervision(name):
    tester.check_auxiliary_supervision(tester.tiny(name))


@every_shape
def test_bfloat16(name):
    tester.check_bfloat16(tester.tiny(name))


@every_shape
def test_float16(name):
    tester.check_float16(tester.tiny(name))


@every_shape
def test_gradient_checkpointing(name):
    tester.check_gradient_checkpointing(tester.tiny(name))


@every_shape
def test_save_and_load(name, tmp_path):
    tester.check_save_and_load(tester.tiny(name), tmp_path)


@every_shape
def test_deepcopy(name):
    tester.check_deepcopy(tester.tiny(name))


@every_shape
def test_outputs(name):
    tester.check_outputs(tester.tiny(name))


@every_shape
def test_each_flag_in_training(name):
    tester.check_each_flag_in_training(tester.tiny(name))


@every_shape
def test_export(name):
    tester.check_export(tester.tiny(name))


# --- full width, on the meta device ----------------------------------------------------------------------------------


def parameter_count(name: str, num_labels: int) -> int:
    labels = {index: f"label {index}" for index in range(num_labels)}
    things = list(range(80)) if num_labels == 133 else None  # COCO panoptic: 80 things, 53 stuff
    with torch.device("meta"):
        model = HfMaskFormerForUniversalSegmentation(preset(name, id2label=labels, thing_label_ids=things))
    return sum(parameter.numel() for parameter in model.parameters())


@every_preset
def test_full_width_has_the_strides_of_the_pixel_decoder(name):
    with torch.device("meta"):
        backbone = HfMaskFormerForUniversalSegmentation(preset(name)).model.backbone
    assert backbone.strides == [4, 8, 16, 32]
    assert len(backbone.channels) == 4


@pytest.mark.parametrize(("name", "num_labels"), PUBLISHED)
def test_parameter_count_is_the_published_one(name, num_labels):
    published = PUBLISHED[name, num_labels] * 1e6
    assert abs(parameter_count(name, num_labels) - published) < 0.02 * published


@every_preset
def test_image_processor_agrees_with_the_configuration(name):
    config = preset(name, id2label=tester.LABELS, thing_label_ids=[2], task="panoptic")
    processor = image_processor_for(config)
    height, width = config.image_size
    assert dict(processor.size) == {"max_height": height, "max_width": width}
    assert processor.id2label == tester.LABELS
    assert list(processor.thing_label_ids) == [2]
    for field in ("task", "threshold", "mask_threshold", "overlap_mask_area_threshold", "ignore_index"):
        assert getattr(processor, field) == getattr(config, field), field


def test_an_unknown_preset_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"maskformer-r5'.*maskformer-r50"):
        preset("maskformer-r5")


def test_an_override_that_is_no_field_is_refused():
    with pytest.raises(ValueError, match=r"'number_of_queries'.*'num_queries'"):
        preset("maskformer-light", number_of_queries=3)


def test_one_way_to_name_a_backbone_takes_the_place_of_the_other():
    assert preset("maskformer-r50", backbone="timm/resnet18").backbone_config.model_type == "timm_backbone"
    own = {"model_type": "resnet", "depths": [1, 1, 1, 1], "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    assert preset("lite-mobilenetv3-small", backbone_config=own).backbone_config.depths == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_queries", 0, r"num_queries must be at least 1, got 0"),
        ("threshold", 2, r"threshold must be in 0\.\.1, got 2"),
        ("mask_threshold", -0.1, r"mask_threshold must be in 0\.\.1, got -0\.1"),
    ],
)
def test_values_that_no_model_can_have_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        preset("maskformer-r50", **{field: value})


def test_a_preset_is_not_changed_by_its_configurations():
    before = json.dumps(PRESETS["maskformer-light"].fields, sort_keys=True)
    preset("maskformer-light", num_channels=1).backbone_config.depths[0] = 7
    assert json.dumps(PRESETS["maskformer-light"].fields, sort_keys=True) == before


# --- model cards -----------------------------------------------------------------------------------------------------


@every_preset
def test_model_card_states_the_counted_parameters(name, project_root: Path):
    text = (project_root / "model_cards" / f"{name}.md").read_text()
    stated = re.search(r"\*\*Parameters:\*\* ([\d,]+) with (\d+) labels", text)
    assert stated, "the card must say '**Parameters:** N with K labels'"
    assert int(stated[1].replace(",", "")) == parameter_count(name, int(stated[2]))
    assert "No weights are published yet" in text


def test_there_is_no_card_without_a_preset(project_root: Path):
    assert {path.stem for path in (project_root / "model_cards").glob("*.md")} == set(list_presets())
