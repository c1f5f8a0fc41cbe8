"""Graphs of torch.compile: one for inference, and in training a single break, where matching goes through the host."""

import pytest
import torch
from torch import _dynamo as dynamo

from model import variant_tester as tester

MEMBERS = (
    "mask2former-light",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("maskformer-swin-tiny", "panoptic-segformer-pvtv2-b0", "maskformer-light-anchored")
    ),
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    dynamo.reset()
    yield
    dynamo.reset()


@pytest.mark.parametrize("name", MEMBERS)
def test_inference_is_one_graph(name):
    config = tester.tiny(name)
    model, inputs = tester.build(config).eval(), tester.unlabelled(tester.batch(config))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        actual, expected = compiled(**inputs), model(**inputs)
    torch.testing.assert_close(actual.class_queries_logits, expected.class_queries_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.masks_queries_logits, expected.masks_queries_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_training_step_breaks_once(name):
    config = tester.tiny(name)
    model, inputs = tester.build(config).train(), tester.batch(config)
    explained = dynamo.explain(model)(**inputs)
    assert explained.graph_break_count == 1, [reason.reason for reason in explained.break_reasons]
    assert "_loss" in explained.break_reasons[0].reason
