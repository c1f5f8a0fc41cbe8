"""A push through huggingface_hub's real client to a stand-in of the Hub, and back: the same model and outputs."""

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

from hf_maskformer.cli.main import main
from hf_maskformer.hub import publish
from hf_maskformer.hub.publish import push_run
from hf_maskformer.inference.checkpoint import load_checkpoint
from hub.stand_in import TOKEN, StandIn
from model import variant_tester as tester

PUSH = """
import functools, json, os, sys
from hf_maskformer.cli.main import main
from hf_maskformer.hub import publish

run, report = sys.argv[1], {}

def refused(name, repo_id, **options):
    try:
        publish.push_run(run, repo_id, **options)
    except ValueError as error:
        report[name] = str(error)

assert main(["push", run, "me/fields-light", "--private"]) == 0
report["branch"] = publish.push_run(run, "me/fields-light", revision="trial", samples=False)
refused("namespace", "other/fields-light")
os.environ["HF_TOKEN"] = "hf_wrong"
refused("token", "me/new")
del os.environ["HF_TOKEN"]
refused("login", "me/new")
os.environ["HF_TOKEN"] = "hf_any"
publish.HfApi = functools.partial(publish.HfApi, endpoint="http://127.0.0.1:9")
refused("network", "me/new")
print("REPORT" + json.dumps(report))
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
    environment.update(HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", NO_PROXY="127.0.0.1")
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
        printed = in_a_fresh_home(PUSH, tmp_path / "pusher", hub.endpoint, run)
        check_repository(hub, run)
        check_messages(json.loads(printed.split("REPORT")[1]), hub)
        with torch.no_grad():
            expected = model(**inputs)
        segments = pipeline("image-segmentation", model=str(run / "best"), device="cpu")(str(image))
        parts = [[part["label"], sum(part["mask"].convert("L").tobytes())] for part in segments]
        assert parts
        for way, module in (("installed", "hf_maskformer."), ("remote", "transformers_modules.")):
            hub.downloads.clear()
            in_a_fresh_home(LOAD, tmp_path / way, hub.endpoint, tmp_path, way)
            assert "model.safetensors" in hub.downloads
            got = load_file(tmp_path / f"{way}.safetensors")
            assert torch.equal(got["masks"], expected.masks_queries_logits)
            assert torch.equal(got["classes"], expected.class_queries_logits)
            loaded_from, remote_parts = json.loads((tmp_path / f"{way}.json").read_text())
            assert loaded_from.startswith(module)
            assert remote_parts == parts


def check_repository(hub, run):
    """What the stand-in holds after the push, the pictures only on the main branch."""
    branches = hub.repos["me/fields-light"]
    files = branches["main"]
    assert hub.private == {"me/fields-light": True}
    assert files["model.safetensors"] == (run / "best" / "model.safetensors").read_bytes()
    assert json.loads(files["metrics.json"]) == json.loads((run / "metrics.json").read_text())
    assert yaml.safe_load(files["recipe.yaml"])["dataset"] == "fields"
    assert {"config.json", "preprocessor_config.json", "modeling_hf_maskformer.py", "criterion.py"} <= set(files)
    assert [path for path in files if path.endswith(".png")] == ["samples/step-00000040.png"]
    assert "train_config.json" not in files
    card = ModelCard(files["README.md"].decode())
    assert card.data.model_name == "fields-light"
    assert "](samples/step-00000040.png)" in card.text
    without_pictures = branches["trial"]["README.md"].decode()
    assert "samples/" not in without_pictures
    assert set(hub.cards) == {str(card), without_pictures}
    kinds = hub.commits[0][2]
    assert (kinds["model.safetensors"], kinds["config.json"]) == ("lfsFile", "file")
    assert [(repo, branch) for repo, branch, _ in hub.commits] == [
        ("me/fields-light", "main"),
        ("me/fields-light", "trial"),
    ]
    assert set(branches) == {"main", "trial"}


def check_messages(report, hub):
    assert report["branch"].startswith(f"{hub.endpoint}/me/fields-light/commit/")
    assert "no right to write other/fields-light" in report["namespace"]
    assert "does not accept the token: run `hf auth login`" in report["token"]
    assert report["login"].startswith("not logged in to the Hugging Face Hub: run `hf auth login`")
    assert "me/new was not published, http://127.0.0.1:9 could not be used" in report["network"]
    assert "me/new" not in hub.repos


def test_bad_input_is_refused_before_the_hub_is_asked(make_run, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(publish, "HfApi", refuse)
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


def test_the_verb_reports_on_one_line(make_run, tmp_path, monkeypatch, capsys):
    assert main(["push", str(tmp_path / "absent"), "me/x"]) == 2
    assert capsys.readouterr().err.startswith(f"error: run {tmp_path / 'absent'} does not exist")
    monkeypatch.setattr(publish, "get_token", lambda: "hf_any")
    assert main(["push", str(make_run()), "me/x"]) == 2
    assert "cannot publish me/x while HF_HUB_OFFLINE is set" in capsys.readouterr().err
