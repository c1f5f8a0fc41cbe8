"""Every recipe can be trained with, the published ones hold the published numbers, and named recipes exist."""

import re
from pathlib import Path

import pytest
import torch

from hf_maskformer import HfMaskFormerForUniversalSegmentation, preset
from hf_maskformer.data.augment_presets import augmentation_preset
from hf_maskformer.data.formats import FORMAT_TASKS
from hf_maskformer.presets import image_processor_for
from hf_maskformer.training.config import TrainConfig, read_recipe, train_config
from hf_maskformer.training.optimizer import parameter_groups
from hf_maskformer.training.setup import build_augmentation
from hf_maskformer.training.train import schedule_factor

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
MAX_RECIPE_LINES = 40
PAGES = ("README.md", "docs/*.md", "model_cards/*.md", "recipes/*.yaml", "src/**/*.py", "benchmarks/*.py")
RECIPE_NAME = re.compile(r"recipes/[\w-]+\.yaml")


def recipe(name: str) -> TrainConfig:
    return train_config(ROOT / "recipes" / f"{name}.yaml")


def processes(name: str) -> int:
    """Of the recipe's command."""
    return int(re.search(r"--num_processes (\d+)", (ROOT / "recipes" / f"{name}.yaml").read_text())[1])


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


def full_size_model(config: TrainConfig) -> HfMaskFormerForUniversalSegmentation:
    """The recipe's model without memory for its weights, with as many classes as the fixed matching has queries."""
    count = config.config_overrides.get("num_queries", 7)
    fields = {"id2label": {label: str(label) for label in range(count)}, "thing_label_ids": [0], "task": config.task}
    with torch.device("meta"):
        return HfMaskFormerForUniversalSegmentation(preset(config.preset, **{**fields, **config.config_overrides}))


def test_a_recipe_builds_model_augmentation_and_optimizer_groups(path):
    config = train_config(path)
    model = full_size_model(config)
    augmentation = build_augmentation(config, image_processor_for(model.config))
    if augmentation.crop_size is not None:
        assert min(augmentation.crop_size) >= 32
    groups = parameter_groups(
        model,
        learning_rate=config.learning_rate,
        backbone_multiplier=config.backbone_learning_rate_multiplier,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
    )
    grouped = [name for group in groups for name in group["parameter_names"]]
    assert sorted(grouped) == sorted(name for name, value in model.named_parameters() if value.requires_grad)
    assert {group["weight_decay"] for group in groups} == {config.weight_decay, 0.0}


def test_a_recipe_says_only_what_differs(path):
    plain = TrainConfig(max_steps=1)
    values = read_recipe(path)
    same = [name for name, value in values.items() if name != "preset" and value == getattr(plain, name)]
    assert [name for name in same if name not in ("dataset", "max_steps")] == []
    assert len(path.read_text().splitlines()) <= MAX_RECIPE_LINES
    assert path.read_text().startswith("# ")
    assert f"recipes/{path.name}" in path.read_text() or path.stem == "scenes"
    if config_format := values.get("format"):
        assert values["task"] in FORMAT_TASKS[config_format]


# Cheng et al., NeurIPS 2021, section 4.2, and the authors' configuration files. Images per step, steps, rate, backbone
# multiplier, weight decay, warm-up.
PUBLISHED = {
    "ade20k_maskformer-r50": (16, 160_000, 1e-4, 0.1, 1e-4, 0),
    "ade20k_maskformer-swin-tiny": (16, 160_000, 6e-5, 1.0, 0.01, 1500),
    "coco-panoptic_maskformer-r50-panoptic": (64, 554_400, 1e-4, 0.1, 1e-4, 0),
    "cityscapes_maskformer-r101": (16, 90_000, 1e-4, 0.1, 1e-4, 0),
}


@pytest.mark.parametrize(("name", "numbers"), PUBLISHED.items(), ids=list(PUBLISHED))
def test_published_numbers(name, numbers):
    images, steps, rate, multiplier, decay, warmup = numbers
    config = recipe(name)
    assert config.images_per_step == processes(name) * config.batch_size == images
    assert (config.max_steps, config.epochs, config.max_minutes) == (steps, None, None)
    assert (config.learning_rate, config.backbone_learning_rate_multiplier) == (rate, multiplier)
    assert (config.weight_decay, config.warmup_steps) == (decay, warmup)
    assert (config.max_grad_norm, config.mixed_precision, config.ema_decay) == (0.01, "no", None)
    model = full_size_model(config).config
    assert (model.loss_class_weight, model.loss_mask_weight, model.loss_dice_weight) == (1, 20, 1)
    assert (model.num_queries, model.loss_no_object_weight) == (100, 0.1)


# Cheng et al., CVPR 2022, section 4.1, and the authors' configuration files; 16 images per step, rate 1e-4, backbone
# multiplier 0.1 and decay 0.05 in all of them. Steps.
MASK2FORMER = {
    "ade20k_mask2former-r50": 160_000,
    "ade20k_mask2former-swin-tiny": 160_000,
    "coco-panoptic_mask2former-r50": 368_750,
    "coco-panoptic_mask2former-swin-tiny": 368_750,
    "cityscapes_mask2former-r50": 90_000,
}
SEGFORMERS = [f"coco-panoptic_panoptic-segformer-{backbone}" for backbone in ("r50", "pvtv2-b0", "pvtv2-b2")]


@pytest.mark.parametrize(("name", "steps"), MASK2FORMER.items(), ids=list(MASK2FORMER))
def test_published_numbers_of_mask2former(name, steps):
    config = recipe(name)
    assert config.images_per_step == processes(name) * config.batch_size == 16
    assert (config.max_steps, config.epochs, config.max_minutes) == (steps, None, None)
    assert (config.learning_rate, config.backbone_learning_rate_multiplier) == (1e-4, 0.1)
    assert (config.weight_decay, config.warmup_steps) == (0.05, 0)
    assert (config.max_grad_norm, config.mixed_precision, config.ema_decay) == (0.01, "fp16", None)
    model = full_size_model(config).config
    assert (model.loss_class_weight, model.loss_mask_weight, model.loss_dice_weight) == (2, 5, 5)
    assert (model.matcher_class_cost, model.matcher_mask_cost, model.matcher_dice_cost) == (2, 5, 5)
    assert (model.criterion_points, model.criterion_oversample_ratio) == (12544, 3)
    assert model.criterion_importance_ratio == 0.75
    assert (model.num_queries, model.loss_no_object_weight) == (100, 0.1)


@pytest.mark.parametrize("name", SEGFORMERS)
def test_published_numbers_of_panoptic_segformer(name):
    """Li et al., CVPR 2022, section 4, and the authors' configs/panformer/base.py."""
    config = recipe(name)
    assert config.images_per_step == processes(name) * config.batch_size == 8
    assert (config.max_steps, config.epochs, config.max_minutes) == (None, 24, None)
    assert (config.learning_rate, config.backbone_learning_rate_multiplier) == (1.4e-4, 0.1)
    assert (config.weight_decay, config.warmup_steps) == (1e-4, 0)
    assert (config.max_grad_norm, config.mixed_precision, config.ema_decay) == (0.1, "no", None)
    assert [factor(config, epoch, 24) for epoch in (0, 17.9, 18, 23.9)] == [1.0, 1.0, 0.1, 0.1]
    model = full_size_model(config)
    fields = model.config
    assert (fields.loss_class_weight, fields.loss_box_weight, fields.loss_giou_weight) == (2, 5, 2)
    assert (fields.matcher_class_cost, fields.matcher_box_cost, fields.matcher_giou_cost) == (2, 5, 2)
    assert (fields.loss_dice_weight, fields.matcher_dice_cost) == (2, 2)
    assert fields.num_queries == 300 + 53
    groups = parameter_groups(
        model,
        learning_rate=config.learning_rate,
        backbone_multiplier=config.backbone_learning_rate_multiplier,
        weight_decay=config.weight_decay,
    )
    rates = {key: group["lr"] for group in groups for key in group["parameter_names"]}
    assert rates["model.query_decoder.reference_points.weight"] == pytest.approx(1.4e-5)
    assert rates["model.pixel_decoder.layers.5.self_attention.sampling_offsets.bias"] == pytest.approx(1.4e-5)
    assert rates["model.query_decoder.class_predictors.5.weight"] == 1.4e-4


def factor(config: TrainConfig, spent: float, budget: float | None = None) -> float:
    """The part of the full rate after `spent` of the budget, steps or epochs."""
    return schedule_factor(config, step=int(spent), progress=spent / (budget or config.max_steps))


def test_published_schedules():
    coco = recipe("coco-panoptic_maskformer-r50-panoptic")
    assert [factor(coco, step) for step in (0, 369_599, 369_600, 554_399)] == [1.0, 1.0, 0.1, 0.1]
    for backbone in ("r50", "swin-tiny"):
        coco = recipe(f"coco-panoptic_mask2former-{backbone}")
        assert [factor(coco, step) for step in (0, 327_777, 327_778)] == [1.0, 1.0, 0.1]
        assert [factor(coco, step) for step in (355_091, 355_092)] == pytest.approx([0.1, 0.01])
    ade20k = recipe("ade20k_maskformer-r50")
    assert factor(ade20k, 80_000) == pytest.approx(0.5**0.9)
    swin = recipe("ade20k_maskformer-swin-tiny")
    assert factor(swin, 749) == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize(
    ("name", "crop", "shortest", "canvas"),
    [
        ("ade20k_maskformer-r50", (512, 512), (256, 1024), [512, 512]),
        ("ade20k_maskformer-swin-tiny", (512, 512), (256, 1024), [512, 512]),
        ("cityscapes_maskformer-r101", (512, 1024), (512, 2048), [1024, 2048]),
        ("ade20k_mask2former-r50", (512, 512), (256, 1024), [512, 512]),
        ("ade20k_mask2former-swin-tiny", (512, 512), (256, 1024), [512, 512]),
        ("cityscapes_mask2former-r50", (512, 1024), (512, 2048), [1024, 2048]),
    ],
)
def test_published_crops(name, crop, shortest, canvas):
    config = recipe(name)
    model = full_size_model(config)
    augmentation = build_augmentation(config, image_processor_for(model.config))
    assert augmentation.crop_size == crop
    assert (min(augmentation.resize.sizes), max(augmentation.resize.sizes)) == shortest
    assert list(model.config.image_size) == canvas
    assert augmentation.color_jitter


@pytest.mark.parametrize("backbone", ["r50", "swin-tiny"])
def test_published_large_scale_jitter(backbone):
    config = recipe(f"coco-panoptic_mask2former-{backbone}")
    processor = image_processor_for(full_size_model(config).config)
    augmentation = build_augmentation(config, processor)
    assert (augmentation.crop_size, augmentation.scale_range) == ((1024, 1024), (0.1, 2.0))
    assert not augmentation.color_jitter
    assert (processor.threshold, processor.overlap_mask_area_threshold, processor.panoptic_merge) == (
        0.8,
        0.8,
        "argmax",
    )


@pytest.mark.parametrize("name", SEGFORMERS)
def test_panoptic_segformer_crops_as_detr_does_and_merges_whole_masks(name):
    config = recipe(name)
    processor = image_processor_for(full_size_model(config).config)
    augmentation = build_augmentation(config, processor)
    assert repr(augmentation.resize) == repr(augmentation_preset("maskformer-coco-panoptic").resize)
    assert not augmentation.color_jitter
    assert (processor.size.max_height, processor.size.max_width) == (800, 1333)
    assert (processor.panoptic_merge, processor.threshold) == ("mask_wise", 0.25)
    assert processor.overlap_mask_area_threshold == 0.6
    assert processor.stuff_overlap_mask_area_threshold == 0.8


def test_published_panoptic_recipe_crops_as_detr_does_and_stores_its_thresholds():
    config = recipe("coco-panoptic_maskformer-r50-panoptic")
    model = full_size_model(config)
    processor = image_processor_for(model.config)
    augmentation = build_augmentation(config, processor)
    assert augmentation.crop_size is None
    assert repr(augmentation.resize) == repr(augmentation_preset("maskformer-coco-panoptic").resize)
    assert not augmentation.color_jitter
    assert (processor.threshold, processor.overlap_mask_area_threshold) == (0.8, 0.8)
    assert model.config.pixel_decoder == "fpn_transformer"


def test_another_preset_takes_the_recipes_place():
    config = train_config(ROOT / "recipes" / "cityscapes_maskformer-r101.yaml", {"preset": "maskformer-r50"})
    assert full_size_model(config).config.backbone_config.depths == [3, 4, 6, 3]


def test_recipes_that_are_named_exist():
    texts = {page: page.read_text() for pattern in PAGES for page in sorted(ROOT.glob(pattern))}
    named = {(name, page.name) for page, text in texts.items() for name in RECIPE_NAME.findall(text)}
    assert {name for name, _ in named} >= {"recipes/camvid.yaml", "recipes/ade20k_maskformer-r50.yaml"}
    assert [(name, page) for name, page in sorted(named) if not (ROOT / name).is_file()] == []
