"""A push through huggingface_hub's real client to a stand-in of the Hub, and back: the same model and outputs."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import pipeline

from hf_maskformer.hub import publish
from hf_maskformer.hub.publish import push_run
from hf_maskformer.inference.checkpoint import load_checkpoint
from hub.card_rules import card_problems
from hub.stand_in import TOKEN, StandIn
from model import variant_tester as tester

PUSH = """
import sys
from hf_maskformer.cli.main import main
from hf_maskformer.hub import push_run
from hf_maskformer.inference.checkpoint import load_checkpoint

run = sys.argv[1]
assert main(["push", run, "me/fields-light", "--private"]) == 0
assert push_run(run, "me/fields-light", revision="trial", samples=False)
model, processor = load_checkpoint(run + "/best")
model.push_to_hub("me/fields-light")
model.push_to_hub("me/parts")
processor.push_to_hub("me/parts")
"""

TRAIN = """
from transformers import TrainingArguments
from hf_maskformer import HfMaskFormerForUniversalSegmentation, preset
from hf_maskformer.data import TrainAugmentation, TrainingDataset, load
from hf_maskformer.presets import image_processor_for
from hf_maskformer.training import HfMaskFormerTrainer, TrainerCollator

data = load("scenes", split="train", length=4, image_size=64, task="semantic")
model = HfMaskFormerForUniversalSegmentation(
    preset("maskformer-light", id2label=data.label_spec.id2label, task="semantic", image_size=[64, 64])
)
processor = image_processor_for(model.config)
arguments = TrainingArguments(
    "trainer", max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to=[], save_strategy="no",
    remove_unused_columns=False, push_to_hub=True, hub_model_id="me/trainer",
)
trainer = HfMaskFormerTrainer(
    model=model, args=arguments, train_dataset=TrainingDataset(data, TrainAugmentation(crop_size=(64, 64))),
    data_collator=TrainerCollator(processor, crop_size=(64, 64)), processing_class=processor,
)
trainer.train()
trainer.push_to_hub()
model.save_pretrained("trained")
"""

LOAD = """
import builtins, sys
with_package = sys.argv[2] == "installed"

class Without:
    '''A finder of modules that does not find the package.'''
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *args, **kwargs):
        return None if name.split(".")[0] == "hf_maskformer" else self.finder.find_spec(name, *args, **kwargs)
    def __getattr__(self, name):
        return getattr(self.finder, name)

def refuse(*args):
    raise AssertionError(f"asked on stdin: {args}")

builtins.input = refuse
if with_package:
    import hf_maskformer
else:
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

import json
from pathlib import Path
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForUniversalSegmentation, pipeline

root = Path(sys.argv[1])
trust = {} if with_package else {"trust_remote_code": True}
model = AutoModelForUniversalSegmentation.from_pretrained("me/fields-light", **trust).eval()
with torch.no_grad():
    output = model(**load_file(root / "inputs.safetensors"))
save_file({"masks": output.masks_queries_logits.contiguous(), "classes": output.class_queries_logits.contiguous()},
          root / f"{sys.argv[2]}.safetensors")
segment = pipeline("image-segmentation", model="me/fields-light", device="cpu", **trust)
parts = [[part["label"], sum(part["mask"].convert("L").tobytes())] for part in segment(Image.open(root / "image.png"))]
(root / f"{sys.argv[2]}.json").write_text(json.dumps([type(model).__module__, parts]))
"""


def in_a_fresh_home(script, home, endpoint, *arguments):
    """The script's stdout, run with nothing of this machine's Hub cache or login."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN}
    # Xet needs a storage service of its own; without it the client uploads by LFS.
    environment.update(HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", NO_PROXY="127.0.0.1,localhost")
    environment["HF_HUB_DISABLE_TELEMETRY"] = "1"
    for name in ("PYTHONPATH", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_TOKEN_PATH"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=home.parent,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_a_push_comes_back_as_the_same_model(make_run, tmp_path):
    run = make_run()
    model, _ = load_checkpoint(run / "best")
    inputs = tester.unlabelled(tester.batch(model.config))
    save_file(inputs, tmp_path / "inputs.safetensors")
    image = tmp_path / "image.png"
    Image.effect_noise((70, 40), 60).convert("RGB").save(image)
    with StandIn() as hub:
        in_a_fresh_home(PUSH, tmp_path / "pusher", hub.endpoint, run)
        check_repository(hub, run)
        check_pushes_of_transformers(hub)
        with torch.no_grad():
            expected = model(**inputs)
        segments = pipeline("image-segmentation", model=str(run / "best"), device="cpu")(str(image))
        parts = [[part["label"], sum(part["mask"].convert("L").tobytes())] for part in segments]
        assert parts
        weights = hashlib.sha256((run / "best" / "model.safetensors").read_bytes()).hexdigest()
        for way, module in (("installed", "hf_maskformer."), ("remote", "transformers_modules.")):
            hub.downloads.clear()
            in_a_fresh_home(LOAD, tmp_path / way, hub.endpoint, tmp_path, way)
            assert weights in hub.downloads
            got = load_file(tmp_path / f"{way}.safetensors")
            assert torch.equal(got["masks"], expected.masks_queries_logits)
            assert torch.equal(got["classes"], expected.class_queries_logits)
            loaded_from, remote_parts = json.loads((tmp_path / f"{way}.json").read_text())
            assert loaded_from.startswith(module)
            assert remote_parts == parts


def check_repository(hub, run):
    """What the stand-in holds after the pushes, the pictures of images only on the main branch."""
    branches = hub.repos["me/fields-light"]
    files = branches["main"]
    assert hub.private["me/fields-light"]
    assert files["model.safetensors"] == (run / "best" / "model.safetensors").read_bytes()
    assert json.loads(files["metrics.json"]) == json.loads((run / "metrics.json").read_text())
    assert yaml.safe_load(files["recipe.yaml"])["dataset"] == "fields"
    assert {"config.json", "preprocessor_config.json", "modeling_hf_maskformer.py", "criterion.py"} <= set(files)
    assert {path for path in files if path.endswith(".png")} == {"samples/step-00000040.png", "training_curves.png"}
    assert files["training_curves.png"] == (run / "training_curves.png").read_bytes()
    assert "train_config.json" not in files
    card = ModelCard(files["README.md"].decode())
    assert card.data.model_name == "fields-light"
    assert "](samples/step-00000040.png)" in card.text
    assert "](training_curves.png)" in card.text
    without_samples = branches["trial"]["README.md"].decode()
    assert "samples/" not in without_samples
    assert {str(card), without_samples} <= set(hub.cards)
    kinds = hub.commits[0][2]
    assert (kinds["model.safetensors"], kinds["config.json"]) == ("lfsFile", "file")
    second = {"header": "header", "README.md": "file", "samples/step-00000040.png": "deletedFile"}
    assert hub.commits[1] == ("me/fields-light", "trial", second)
    assert "lfs_part" in hub.requests


def check_pushes_of_transformers(hub):
    """`push_to_hub` of model and processor brings the code along; a card that is there gets no other text."""
    branches = hub.repos["me/fields-light"]
    documents = {"samples/step-00000040.png", "training_curves.png", "metrics.json", "recipe.yaml"}
    parts = hub.repos["me/parts"]["main"]
    assert set(parts) == set(branches["main"]) - documents
    assert all(parts[name] == branches["main"][name] for name in set(parts) - {"README.md"})
    assert hub.unknown == []


@pytest.mark.slow
def test_the_trainer_of_transformers_pushes_the_trained_model_with_its_code(tmp_path):
    with StandIn() as hub:
        in_a_fresh_home(TRAIN, tmp_path / "home", hub.endpoint)
        files = hub.repos["me/trainer"]["main"]
        assert files["model.safetensors"] == (tmp_path / "trained" / "model.safetensors").read_bytes()
        assert {"config.json", "preprocessor_config.json", "modeling_hf_maskformer.py", "criterion.py"} <= set(files)
        assert card_problems(files["README.md"].decode()) == []
        assert hub.unknown == []


def test_bad_input_is_refused_before_the_hub_is_asked(make_run, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(publish, "open_repository", refuse)
    run = make_run()
    with pytest.raises(ValueError, match=r"run .*absent does not exist"):
        push_run(tmp_path / "absent", "me/x")
    for bad in ("a/b/c", "me/has space", "-x", ""):
        with pytest.raises(ValueError, match="cannot be used: it must be owner/name"):
            push_run(run, bad)
    with pytest.raises(ValueError, match="license_id is 'My Licence'"):
        push_run(run, "me/x", license_id="My Licence")
    (run / "best" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json"):
        push_run(run, "me/x")
    (run / "best" / "config.json").unlink()
    with pytest.raises(ValueError, match="holds no model in best/"):
        push_run(run, "me/x")
