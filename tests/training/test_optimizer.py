"""Parameter groups and the learning rate, on modules small enough to list."""

import math

import pytest
import torch
from torch import nn

from hf_maskformer.training.optimizer import (
    build_optimizer,
    learning_rate_factor,
    parameter_groups,
    set_learning_rate,
)
from model.variant_tester import build, tiny


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)
        self.queries = nn.Embedding(5, 4)
        self.position_embeddings = nn.Parameter(torch.zeros(1, 9, 4))
        self.tied = self.head


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Inner()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def groups():
    return parameter_groups(Model(), learning_rate=1.0, backbone_multiplier=0.1, weight_decay=0.5)


def test_each_parameter_is_in_the_right_group_once():
    found = {name: (g["lr"], g["weight_decay"]) for g in groups() for name in g["parameter_names"]}
    assert found == {
        "model.backbone.0.weight": (0.1, 0.5),
        "model.backbone.0.bias": (0.1, 0.0),
        "model.backbone.1.weight": (0.1, 0.0),
        "model.backbone.1.bias": (0.1, 0.0),
        "model.position_embeddings": (1.0, 0.0),
        "model.head.weight": (1.0, 0.5),
        "model.head.bias": (1.0, 0.0),
        "model.queries.weight": (1.0, 0.0),
    }
    assert sum(len(g["params"]) for g in groups()) == len(found)


def test_a_swin_position_table_is_not_decayed():
    module = nn.Module()
    module.relative_position_bias_table = nn.Parameter(torch.zeros(9, 3))
    (group,) = parameter_groups(module, learning_rate=1.0, backbone_multiplier=0.1, weight_decay=0.5)
    assert group["weight_decay"] == 0.0


def settings(name: str, **fields) -> dict[str, tuple[float, float]]:
    """Rate and decay of every parameter of a shrunken preset."""
    found = parameter_groups(
        build(tiny(name, **fields)), learning_rate=1.0, backbone_multiplier=0.5, weight_decay=0.25
    )
    return {key: (group["lr"], group["weight_decay"]) for group in found for key in group["parameter_names"]}


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("mask2former-r50", ("query_features", "query_positions", "level_codes")),
        ("panoptic-segformer-r50", ("thing_queries", "stuff_queries")),
    ],
)
def test_embeddings_and_norms_of_further_members_are_not_decayed(name, tables):
    found = settings(name)
    expected = {f"model.query_decoder.{table}.weight" for table in tables} | {"model.pixel_decoder.level_codes.weight"}
    assert {key: found[key][1] for key in expected} == dict.fromkeys(expected, 0.0)
    norms = [key for key in found if "norm" in key]
    assert len(norms) > 20
    assert {found[key][1] for key in norms} == {0.0}
    decayed = {key for key, (_, decay) in found.items() if decay}
    assert not [key for key in decayed if key.endswith("bias")]
    assert {
        "model.pixel_decoder.layers.0.self_attention.sampling_offsets.weight",
        "model.pixel_decoder.layers.0.feed_forward.expand.weight",
    } <= decayed


@pytest.mark.parametrize("thing_label_ids", [[2], []])
def test_places_of_panoptic_segformer_have_a_tenth_of_the_rate(thing_label_ids):
    found = settings(
        "panoptic-segformer-r50", thing_label_ids=thing_label_ids, num_queries=6 if thing_label_ids else 3
    )
    slow = {key for key, (rate, _) in found.items() if rate == pytest.approx(0.1)}
    attentions = [f"model.pixel_decoder.layers.{layer}.self_attention.sampling_offsets" for layer in range(2)]
    if thing_label_ids:
        attentions += [f"model.query_decoder.layers.{layer}.cross_attention.sampling_offsets" for layer in range(3)]
        attentions.append("model.query_decoder.reference_points")
    assert slow == {f"{name}.{kind}" for name in attentions for kind in ("weight", "bias")}
    others = {rate for key, (rate, _) in found.items() if key not in slow}
    assert others == {1.0, 0.5}


def test_places_of_mask2former_have_the_whole_rate():
    found = settings("mask2former-swin-tiny")
    assert found["model.pixel_decoder.layers.0.self_attention.sampling_offsets.weight"] == (1.0, 0.25)
    assert {rate for rate, _ in found.values()} == {1.0, 0.5}


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="requires a gradient"):
        parameter_groups(nn.Identity(), learning_rate=1.0, backbone_multiplier=1.0, weight_decay=0.0)


def test_learning_rate_is_scaled_from_the_full_rate_each_time():
    optimizer = build_optimizer(Model(), learning_rate=1.0, backbone_multiplier=0.1, weight_decay=0.5)
    for factor in (0.5, 0.25):
        set_learning_rate(optimizer.param_groups, factor)
        assert sorted({g["lr"] for g in optimizer.param_groups}) == [0.1 * factor, factor]


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        ("poly", 0.0, 1.0),
        ("poly", 0.5, 0.5**0.9),
        ("poly", 1.0, 0.0),
        ("poly", 1.2, 0.0),  # a step that overran a budget in minutes
        ("cosine", 0.25, 0.5 * (1 + math.sqrt(0.5))),
        ("constant", 0.9, 1.0),
        ("step", 0.59, 1.0),
        ("step", 0.6, 0.1),
        ("step", 0.8, 0.01),
        ("step", 1.0, 0.01),
    ],
)
def test_schedules(schedule, progress, expected):
    factor = learning_rate_factor(schedule, step=0, progress=progress, warmup_steps=0, schedule_steps=(0.6, 0.8))
    assert factor == pytest.approx(expected, abs=1e-12)


def test_warm_up_is_linear_and_ends():
    factors = [learning_rate_factor("constant", step=s, progress=0.0, warmup_steps=4) for s in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule is 'linear'; allowed: poly, cosine, step, constant"):
        learning_rate_factor("linear", step=0, progress=0.0, warmup_steps=0)


def test_layer_decay_of_a_backbone_that_is_not_trained_is_refused():
    with pytest.raises(ValueError, match=r"layer_decay is 0\.5, but no parameter of the backbone is trained"):
        parameter_groups(
            nn.Linear(2, 2), learning_rate=1.0, backbone_multiplier=1.0, weight_decay=0.0, layer_decay=0.5
        )
