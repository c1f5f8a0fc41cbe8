"""`push_to_hub` of a run: refused before the first step, the same repository as `hf-maskformer push`, nothing lost."""

import json
from pathlib import Path

import pytest

from hf_maskformer.hub.publish import push_run
from hf_maskformer.inference.checkpoint import load_checkpoint
from hf_maskformer.training.config import FIELDS_FIXED_BY_RESUME
from hf_maskformer.training.publishing import NotPublished
from hf_maskformer.training.train import train
from hub.stand_in import stand_in_of_the_hub

TRAIN = """
import json, sys
from hf_maskformer.training.config import TrainConfig, checked_fields
from hf_maskformer.training.train import train
try:
    train(TrainConfig(**checked_fields(json.loads(sys.argv[1]), "test")))
except ValueError as error:
    print("REFUSED", error)
"""


@pytest.fixture
def hub(monkeypatch):
    with stand_in_of_the_hub(monkeypatch) as server:
        yield server


def test_the_run_is_what_push_makes_of_it(hub, tiny_run):
    config = tiny_run(max_steps=2, push_to_hub="me/scenes", hub_private=True)
    train(config)
    pushed = hub.repos["me/scenes"]["main"]
    assert hub.private == {"me/scenes": True}
    push_run(config.output_dir, "me/again")
    again = hub.repos["me/again"]["main"]
    card = pushed.pop("README.md"), again.pop("README.md").replace(b"me/again", b"me/scenes")
    assert card[0] == card[1].replace(b"\n# again\n", b"\n# scenes\n").replace(b"name: again\n", b"name: scenes\n")
    assert pushed == again
    names = {"model.safetensors", "config.json", "preprocessor_config.json", "modeling_hf_maskformer.py"}
    names |= {"recipe.yaml", "metrics.json", "training_curves.png", "samples/step-00000002.png"}
    assert names <= set(pushed)
    assert b"push_to_hub" not in pushed["recipe.yaml"]
    assert hub.unknown == []


def test_refused_before_the_first_step(hub, tiny_run, monkeypatch):
    config = tiny_run(push_to_hub="other/scenes")
    with pytest.raises(ValueError, match="push_to_hub: the token has no right to write other/scenes"):
        train(config)
    assert not (Path(config.output_dir) / "log.jsonl").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match=r"push_to_hub: .* does not accept the token"):
        train(tiny_run(push_to_hub="me/scenes"))
    train(tiny_run(max_steps=1))  # the refused run left nothing in the way


def test_a_push_that_fails_at_the_end_loses_nothing(hub, tiny_run):
    hub.broken["commit"] = 403
    config = tiny_run(max_steps=1, push_to_hub="me/scenes", hub_private=True)
    with pytest.raises(NotPublished, match="finished and whole in") as caught:
        train(config)
    assert f"hf-maskformer push {config.output_dir} me/scenes --private" in str(caught.value)
    assert caught.value.summary["steps"] == 1
    run = Path(config.output_dir)
    assert json.loads((run / "metrics.json").read_text())["steps"] == 1
    load_checkpoint(run / "best")
    assert list(hub.repos["me/scenes"]["main"]) == [".gitattributes"]


def test_a_resumed_run_may_be_published_elsewhere():
    assert not {"push_to_hub", "hub_private"} & set(FIELDS_FIXED_BY_RESUME)


def test_private_needs_a_repository(tiny_run):
    with pytest.raises(ValueError, match="hub_private is set, but without push_to_hub"):
        tiny_run(hub_private=True)


@pytest.mark.slow
def test_every_process_is_told(tiny_run, in_processes):
    config = tiny_run(push_to_hub="me/scenes", val_split=None)
    results = in_processes(TRAIN, json.dumps(config.to_dict()), HF_TOKEN="hf_any", HF_HUB_OFFLINE="1")
    for one in results:
        assert "REFUSED push_to_hub: cannot publish me/scenes while HF_HUB_OFFLINE is set" in one.out, one.errors
