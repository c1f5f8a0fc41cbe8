"""From one label set to another, row by row; frozen parts; what does not fit is named before the first step."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from hf_maskformer.data.load import load
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.presets import image_processor_for
from hf_maskformer.training.checkpoint import newest_checkpoint
from hf_maskformer.training.fine_tuning import class_rows, fine_tuned_model, freeze_parts
from hf_maskformer.training.setup import build_model
from hf_maskformer.training.train import train
from model.variant_tester import build, tiny
from training.stored_models import checkpoint, config_of, state


def new_labels(*names):
    return {"id2label": dict(enumerate(names)), "thing_label_ids": [], "task": "semantic"}


@pytest.mark.parametrize(
    ("stored", "wanted", "expected"),
    [
        (["a", "b"], ["b", "c", "a"], [1, None, 0]),
        (["traffic light"], ["Traffic-Light", "x"], [0, None]),
        (["LABEL_0", "LABEL_1"], ["LABEL_0", "LABEL_1"], [0, 1]),
        (["LABEL_0", "LABEL_1"], ["LABEL_0", "LABEL_1", "LABEL_2"], [None, None, None]),
        (["a", "a"], ["a", "b"], [0, None]),
        (["+", "-"], ["-", "+"], [1, 0]),
    ],
)
def test_classes_are_found_by_their_name(stored, wanted, expected):
    assert class_rows(stored, wanted) == expected


def test_heads_keep_the_rows_of_classes_of_the_same_name(stored, caplog):
    old, folder = stored
    torch.manual_seed(7)
    fresh = HfMaskFormerForUniversalSegmentation(
        type(old.config).from_pretrained(folder, **new_labels("road", "tree", "traffic light", "dog"))
    )
    torch.manual_seed(7)
    with caplog.at_level(logging.WARNING):
        new = fine_tuned_model(folder, new_labels("road", "tree", "traffic light", "dog"))
    before, after, random = old.state_dict(), new.state_dict(), fresh.state_dict()
    for part in ("model.class_head.projection.", "pixel_classifier."):
        for kind in ("weight", "bias"):
            name = f"{part}{kind}"
            for row, source in enumerate((2, None, 1, None)):
                expected = random[name][row] if source is None else before[name][source]
                assert torch.equal(after[name][row], expected), (name, row)
    assert torch.equal(after["model.class_head.projection.weight"][4], before["model.class_head.projection.weight"][3])
    for name in before:
        if "class_head" not in name and "pixel_classifier" not in name:
            assert torch.equal(after[name], before[name]), name
    assert (
        "the heads are made for 4 classes instead of 3; kept by their name: road, traffic light; "
        "starting anew: tree, dog" in caplog.text
    )


def test_the_same_classes_in_another_order_are_put_in_order(stored):
    old, folder = stored
    new = fine_tuned_model(folder, new_labels("road", "sky", "Traffic-Light"))
    weight = old.state_dict()["model.class_head.projection.weight"]
    assert torch.equal(new.state_dict()["model.class_head.projection.weight"], weight[[2, 0, 1, 3]])


def test_nothing_changed_changes_nothing_and_says_nothing(stored, caplog):
    old, folder = stored
    with caplog.at_level(logging.WARNING):
        new = fine_tuned_model(folder, {})
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items())
    assert "init_from" not in caplog.text


@pytest.mark.parametrize("number", [5, 20])
def test_queries_are_cut_or_grown(stored, caplog, number):
    old, folder = stored
    with caplog.at_level(logging.WARNING):
        new = fine_tuned_model(folder, {"num_queries": number})
    name = "model.query_decoder.query_positions.weight"
    queries, before = new.state_dict()[name], old.state_dict()[name]
    assert queries.shape == (number, 16)
    assert torch.equal(queries[:12], before[:number])
    assert len(queries[12:]) == 0 or queries[12:].std() > 0.5  # as the model initialises them: deviation 1
    kept = min(number, 12)
    assert f"{number} queries instead of 12; {kept} keep their weights, {number - kept} start anew" in caplog.text


def test_fixed_queries_go_with_their_classes(tiny_run, tmp_path):
    old = checkpoint(tiny_run, tmp_path / "fixed", matcher="fixed", num_queries=4)
    new = fine_tuned_model(str(tmp_path / "fixed"), {**new_labels("tree", "road", "sky"), "num_queries": 5})
    name = "model.query_decoder.query_positions.weight"
    queries, before = new.state_dict()[name], old.state_dict()[name]
    assert torch.equal(queries[1:4], before[[2, 0, 3]])  # road, sky, and the query of no class
    assert not any(torch.equal(queries[0], row) for row in before)


@pytest.mark.parametrize(
    ("field", "value", "shapes"),
    [("mask_dim", 32, r"\(16, 16, 3, 3\) .* \(32, 16, 3, 3\)"), ("query_decoder_ffn_dim", 48, r"\(32, 16\) .* \(48,")],
)
def test_another_shape_names_parameter_shapes_and_field(stored, field, value, shapes):
    _, folder = stored
    with pytest.raises(ValueError, match=rf"init_from .*model\.\S+ is {shapes}.* because of {field}={value}\. Only"):
        fine_tuned_model(folder, {**new_labels("road"), field: value})


def test_parameters_of_a_new_part_are_named(tiny_run, tmp_path, caplog):
    checkpoint(tiny_run, tmp_path / "plain", loss_pixel_weight=0.0)
    with caplog.at_level(logging.WARNING):
        fine_tuned_model(str(tmp_path / "plain"), {"loss_pixel_weight": 1.0, "query_decoder_layers": 1})
    assert "2 parameters start anew (the checkpoint does not have them): pixel_classifier." in caplog.text
    assert "parameters are not used (of the checkpoint): model.query_decoder.layers.1." in caplog.text


def test_an_official_checkpoint_is_fine_tuned(tiny_run, tmp_path, caplog):
    fields = {"pixel_decoder_dim": 32, "mask_head_layers": 3, "mask_head": "dot_product"}
    fields |= {"query_decoder_memory_stride": 32, "loss_pixel_weight": 0.0, "criterion_resolution": "target"}
    torch.manual_seed(1)
    old = HfMaskFormerForUniversalSegmentation(config_of(tiny_run, **fields))
    old.save_official(tmp_path / "official", image_processor=image_processor_for(old.config))
    with caplog.at_level(logging.WARNING):
        new = fine_tuned_model(str(tmp_path / "official"), new_labels("road", "cat"))
    before, after = old.state_dict(), new.state_dict()
    head = "model.class_head.projection.weight"
    assert torch.equal(after[head][[0, 2]], before[head][[2, 3]])
    assert all(torch.equal(after[name], before[name]) for name in before if "class_head" not in name)
    assert "2 classes instead of 3" in caplog.text
    assert "start anew (" not in caplog.text


# --- Mask2Former and Panoptic SegFormer ------------------------------------------------------------------------------

QUERY_TABLES = ("query_features", "query_positions")


def saved(folder: Path, name: str, **fields) -> dict[str, torch.Tensor]:
    """The weights of a shrunken preset (stuff "road" and "tree", thing "car", 6 queries) that lies in `folder`."""
    model = build(tiny(name, **fields))
    model.save_pretrained(folder)
    return state(model)


def labels_of(things: str, stuff: str) -> dict:
    """Fields for classes in alphabetical order."""
    names = sorted([*things.split(), *stuff.split()])
    ids = [names.index(name) for name in things.split()]
    return {"id2label": dict(enumerate(names)), "thing_label_ids": ids, "task": "panoptic"}


def assert_rows(actual: torch.Tensor, stored: torch.Tensor, rows: list[int | None]) -> None:
    """Row k is row `rows[k]` of `stored`, or, where that is None, none of them."""
    assert len(actual) == len(rows)
    for row, source in zip(actual, rows, strict=True):
        equal = [number for number, other in enumerate(stored) if torch.equal(row, other)]
        assert equal == ([] if source is None else [source])


@pytest.mark.parametrize("number", [4, 9])
def test_queries_of_mask2former_keep_feature_and_position(tmp_path, caplog, number):
    before = saved(tmp_path, "mask2former-swin-tiny")
    with caplog.at_level(logging.WARNING):
        new = fine_tuned_model(str(tmp_path), {**labels_of("car dog", "road"), "num_queries": number})
    after = new.state_dict()
    kept = min(number, 6)
    for table in QUERY_TABLES:
        name = f"model.query_decoder.{table}.weight"
        assert_rows(after[name], before[name], [*range(kept), *[None] * (number - kept)])
    head = "model.class_head.projection.weight"
    assert_rows(after[head], before[head], [2, None, 0, 3])  # car, dog, road, no object
    for name, value in before.items():
        if "class_head" not in name and not any(table in name for table in QUERY_TABLES):
            assert torch.equal(after[name], value), name
    assert "kept by their name: car, road; starting anew: dog" in caplog.text
    assert f"{number} queries instead of 6; {kept} keep their weights, {number - kept} start anew" in caplog.text


def test_fixed_queries_of_mask2former_go_with_their_classes(tmp_path):
    fixed = {"matcher": "fixed", "task": "semantic", "thing_label_ids": [], "num_queries": 3}
    before = saved(tmp_path, "mask2former-r50", **fixed)
    new = fine_tuned_model(str(tmp_path), {**new_labels("car", "sky", "road")})
    for table in QUERY_TABLES:
        name = f"model.query_decoder.{table}.weight"
        assert_rows(new.state_dict()[name], before[name], [2, None, 0])


def test_an_official_mask2former_is_fine_tuned(tmp_path, caplog):
    backbone = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]}
    backbone |= {"window_size": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    sizes = {"feature_size": 32, "mask_feature_size": 16, "hidden_dim": 32, "encoder_feedforward_dim": 48}
    sizes |= {"encoder_layers": 1, "decoder_layers": 4, "num_attention_heads": 4, "dim_feedforward": 48}
    labels = {0: "road", 1: "Traffic-Light", 2: "sky"}
    config = Mask2FormerConfig(backbone_config=backbone, id2label=labels, num_queries=7, **sizes)
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    official = load_file(tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        new = fine_tuned_model(str(tmp_path), {**new_labels("cat", "sky", "traffic light"), "num_queries": 9})
    after = new.state_dict()
    assert_rows(after["model.class_head.projection.weight"], official["class_predictor.weight"], [None, 2, 1, 3])
    for table, theirs in zip(QUERY_TABLES, ("queries_features", "queries_embedder"), strict=True):
        stored = official[f"model.transformer_module.{theirs}.weight"]
        assert_rows(after[f"model.query_decoder.{table}.weight"], stored, [*range(7), None, None])
    name = "model.pixel_level_module.decoder.encoder.layers.0.self_attn.value_proj.weight"
    assert torch.equal(after["model.pixel_decoder.layers.0.self_attention.value.weight"], official[name])
    assert "kept by their name: sky, traffic light; starting anew: cat" in caplog.text
    assert "9 queries instead of 7; 7 keep their weights, 2 start anew" in caplog.text
    assert "start anew (" not in caplog.text
    assert "are not used" not in caplog.text


LOCATION = "model.query_decoder."


@pytest.mark.parametrize("number", [5, 8])
def test_panoptic_segformer_keeps_classes_stuff_and_queries_of_things(tmp_path, caplog, number):
    """6 queries are 4 for things and 2 for stuff; with 3 classes of stuff 2 or 5 are left for things."""
    before = saved(tmp_path, "panoptic-segformer-r50", thing_label_ids=[0, 2])  # things road and car, stuff tree
    assert len(before[f"{LOCATION}thing_queries.weight"]) == 5
    fields = {**labels_of("bus car road", "grass sky tree"), "num_queries": number}
    with caplog.at_level(logging.WARNING):
        new = fine_tuned_model(str(tmp_path), fields)
    after = new.state_dict()
    for layer in range(3):
        for kind in ("weight", "bias"):  # a new bias is as all of them are at the start
            name = f"{LOCATION}class_predictors.{layer}.{kind}"
            assert torch.equal(after[name][[1, 2]], before[name][[1, 0]])
        name = f"{LOCATION}class_predictors.{layer}.weight"
        assert_rows(after[name], before[name], [None, 1, 0])  # bus, car, road
    name = f"{LOCATION}stuff_queries.weight"
    assert_rows(after[name], before[name], [None, None, 0])  # grass, sky, tree
    things = number - 3
    kept = min(things, 5)
    name = f"{LOCATION}thing_queries.weight"
    assert_rows(after[name], before[name], [*range(kept), *[None] * (things - kept)])
    by_row = ("class_predictors", "stuff_queries", "thing_queries")
    for name, value in before.items():
        if not any(part in name for part in by_row):
            assert torch.equal(after[name], value), name
    assert "6 classes instead of 3; kept by their name: car, road, tree; starting anew: bus, grass" in caplog.text
    message = f"{things} queries of things instead of 5; {kept} keep their weights, {things - kept} start anew"
    assert (message in caplog.text) == (things != 5)


def test_a_thing_that_becomes_stuff_starts_anew(tmp_path, caplog):
    before = saved(tmp_path, "panoptic-segformer-r50", thing_label_ids=[0, 2])
    with caplog.at_level(logging.WARNING):
        new = fine_tuned_model(str(tmp_path), {"thing_label_ids": [2], "num_queries": 7})
    after = new.state_dict()
    name = f"{LOCATION}stuff_queries.weight"
    assert_rows(after[name], before[name], [None, 0])  # road, tree
    name = f"{LOCATION}class_predictors.0.weight"
    assert_rows(after[name], before[name], [1])  # car
    assert "kept by their name: tree, car; starting anew: road" in caplog.text


def test_panoptic_segformer_without_stuff_leaves_its_parts_behind(tmp_path, caplog):
    before = saved(tmp_path, "panoptic-segformer-r50")
    with caplog.at_level(logging.WARNING):
        new = fine_tuned_model(str(tmp_path), labels_of("car dog", ""))
    name = f"{LOCATION}thing_queries.weight"
    assert_rows(new.state_dict()[name], before[name], [0, 1, 2, 3, None, None])
    assert f"are not used (of the checkpoint): {LOCATION}stuff_queries.weight" in caplog.text


def test_the_same_panoptic_segformer_says_nothing(tmp_path, caplog):
    before = saved(tmp_path, "panoptic-segformer-r50")
    with caplog.at_level(logging.WARNING):
        after = fine_tuned_model(str(tmp_path), {}).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert "init_from" not in caplog.text


@pytest.mark.parametrize("name", ["mask2former-swin-tiny", "panoptic-segformer-r50"])
def test_further_members_are_trained_from_other_classes_with_a_frozen_backbone(tiny_run, tmp_path, name):
    before = saved(tmp_path / "stored", name, num_queries=16, image_size=[128, 128])
    fields = {"config_overrides": {}, "max_steps": 2, "task": "panoptic", "freeze": ("backbone",)}
    config = tiny_run(init_from=str(tmp_path / "stored"), **fields)
    train(config)
    after = load_file(tmp_path / "run" / "final" / "model.safetensors")
    changed = [key for key in before if key in after and before[key].shape == after[key].shape]
    moved = {key.split(".")[1] for key in changed if not torch.equal(before[key], after[key])}
    assert moved >= {"pixel_decoder", "query_decoder"}
    assert "backbone" not in moved


def test_parts_of_panoptic_segformer(tmp_path):
    model = build(tiny("panoptic-segformer-r50"))
    with pytest.raises(ValueError, match=r"'class_head'; the parts of this model are backbone, pixel_decoder, query"):
        freeze_parts(model, ["class_head"])


# --- through the options of a run ------------------------------------------------------------------------------------


def test_a_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"init_from .*nowhere.* (can be loaded|no config\.json)"):
        fine_tuned_model(str(tmp_path / "nowhere"), {})


def test_a_run_is_fine_tuned_to_the_data_sets_classes(tiny_run, stored, tmp_path):
    old, folder = stored
    config = tiny_run(init_from=folder, config_overrides={"num_queries": 9}, max_steps=2, task="panoptic")
    data = load("scenes", task="panoptic", length=1, image_size=64)
    model, processor = build_model(config, data, None)
    assert tuple(processor.image_mean) == (0.1, 0.2, 0.3)  # as the checkpoint's
    assert model.config.id2label == data.label_spec.id2label
    name = "model.pixel_decoder.stem.conv.weight"
    assert torch.equal(model.state_dict()[name], old.state_dict()[name])
    train(config)
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert final["model.query_decoder.query_positions.weight"].shape[0] == 9
    assert final["model.class_head.projection.weight"].shape[0] == data.label_spec.num_labels + 1


@pytest.mark.parametrize("name", ["id2label", "task", "thing_label_ids"])
def test_what_the_data_set_says_is_no_override(tiny_run, name):
    config = tiny_run(config_overrides={name: "x"})
    with pytest.raises(ValueError, match=rf"config_overrides sets {name} to 'x', but classes and task come from"):
        train(config)


# --- a data set that does not fit a run that is resumed --------------------------------------------------------------


@pytest.mark.parametrize("change", ["classes", "task"])
def test_a_run_is_not_resumed_on_a_data_set_with_other_classes(tiny_run, tmp_path, change):
    config = tiny_run(max_steps=2, val_split=None)
    train(config)
    data = load("scenes", task="semantic" if change == "task" else "panoptic", length=1, image_size=64)
    if change == "classes":
        names = dict(data.label_spec.id2label)
        names[0], names[1] = names[1], names[0]
        data.label_spec = type(data.label_spec)(names, data.label_spec.thing_label_ids)
    checkpoint = newest_checkpoint(tmp_path / "run" / "checkpoints")
    message = {"classes": "does not fit the data set: the model has the data's classes in another order"}
    message["task"] = "was trained for the task 'panoptic', the data is for 'semantic'"
    with pytest.raises(ValueError, match=message[change]):
        build_model(config, data, checkpoint)
