"""A saved directory loads with `trust_remote_code` where this package, scipy and timm are not installed.

One fresh interpreter serves all checks, and one more the presets with a backbone of timm; they write their outputs to
files that the tests below compare with ours.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import pipeline

from hf_maskformer.model.configuration_hf_maskformer import AUTO_MAP
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation, HfMaskFormerModel
from hf_maskformer.presets import image_processor_for, list_presets
from model import variant_tester as tester

MAIN, TIMM_MAIN = "maskformer-light", "lite-mobilenetv3-small"
# Folder of models -> the one that is looked at closely, and the packages that are missing.
PLACES = {"models": (MAIN, "hf_maskformer,scipy,timm"), "timm_models": (TIMM_MAIN, "hf_maskformer,scipy")}

SCRIPT = """
import builtins, json, logging, sys

BLOCKED = set(sys.argv[4].split(","))

class Without:
    '''A finder of modules that does not find the blocked ones.'''
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *args, **kwargs):
        return None if name.split(".")[0] in BLOCKED else self.finder.find_spec(name, *args, **kwargs)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

def refuse(*args):
    raise AssertionError(f"asked on stdin: {args}")

builtins.input = refuse

from pathlib import Path
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageSegmentation, AutoModelForUniversalSegmentation,
    pipeline,
)

lines = []
class Keep(logging.Handler):
    def emit(self, record):
        lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")
for name in ("", "transformers", "huggingface_hub"):
    logging.getLogger(name).addHandler(Keep(level=logging.WARNING))

root = Path(sys.argv[1])
inputs = load_file(root / "inputs.safetensors")
report, tensors = {"classes": {}}, {}
models = root / sys.argv[2]
for folder in sorted(models.iterdir()):
    model = AutoModelForUniversalSegmentation.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        output = model(**inputs)
    for field in ("class_queries_logits", "masks_queries_logits", "valid_extent"):
        tensors[f"{folder.name}.{field}"] = output[field].contiguous()

main = models / sys.argv[3]
config = AutoConfig.from_pretrained(main, trust_remote_code=True)
base = AutoModel.from_pretrained(main, trust_remote_code=True).eval()
image_segmentation = AutoModelForImageSegmentation.from_pretrained(main, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(main, trust_remote_code=True)
segment = pipeline("image-segmentation", model=str(main), trust_remote_code=True, device="cpu")
with torch.no_grad():
    tensors["base.last_hidden_state"] = base(**inputs).last_hidden_state.contiguous()
image = Image.open(root / "image.png")
tensors["pixel_values"] = processor(image)["pixel_values"]
segments = segment(image)

again = root / f"{models.name}_again"
segment.model.save_pretrained(again)
segment.image_processor.save_pretrained(again)
reloaded = AutoModelForUniversalSegmentation.from_pretrained(again, trust_remote_code=True).eval()
AutoImageProcessor.from_pretrained(again, trust_remote_code=True)
with torch.no_grad():
    tensors["again.class_queries_logits"] = reloaded(**inputs).class_queries_logits.contiguous()

for name, thing in {"config": config, "base": base, "image_segmentation": image_segmentation, "processor": processor,
                    "pipeline_model": segment.model, "pipeline_processor": segment.image_processor}.items():
    report["classes"][name] = f"{type(thing).__module__} {type(thing).__name__}"
report["segments"] = [[part["label"], part["score"]] for part in segments]
report["lines"] = lines
report["loaded_though_blocked"] = sorted(BLOCKED & {name.split(".")[0] for name in sys.modules})
save_file(tensors, root / f"{models.name}.safetensors")
(root / f"{models.name}.json").write_text(json.dumps(report))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Every preset saved in its shrunken form, those with a backbone of timm apart."""
    root = tmp_path_factory.mktemp("remote")
    thresholds = {"threshold": 0.0, "mask_threshold": 0.0, "overlap_mask_area_threshold": 0.0}
    for name in list_presets():
        config = tester.tiny(name, task="panoptic", **thresholds)
        model = tester.build(config)
        if model.model.class_head is not None:
            with torch.no_grad():
                model.model.class_head.projection.bias[-1] = -5  # random weights must find something
        folder = root / place(name) / name
        model.save_pretrained(folder)
        image_processor_for(config).save_pretrained(folder)
    save_file(tester.unlabelled(tester.batch(config)), root / "inputs.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "image.png")
    return root


def place(name: str) -> str:
    """The folder of a preset's model."""
    backbone = tester.tiny(name).backbone_config.model_type
    return "timm_models" if backbone == "timm_backbone" else "models"


def loaded_elsewhere(root, folder: str) -> dict:
    """What another process finds, which has no package of ours."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root), folder, *PLACES[folder]],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {**json.loads((root / f"{folder}.json").read_text()), "stderr": done.stderr}


@pytest.fixture(scope="module")
def report(root):
    return loaded_elsewhere(root, "models")


@pytest.fixture(scope="module")
def timm_report(root):
    return loaded_elsewhere(root, "timm_models")


@pytest.fixture(scope="module")
def outputs(root, report):
    return load_file(root / "models.safetensors")


@pytest.fixture(scope="module")
def timm_outputs(root, timm_report):
    return load_file(root / "timm_models.safetensors")


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_gives_the_same_outputs(root, outputs, timm_outputs, name):
    folder = place(name)
    outputs = timm_outputs if folder == "timm_models" else outputs
    tolerance = 1e-5 if folder == "timm_models" else 1e-6  # mobile convolutions round as their memory is aligned
    model = HfMaskFormerForUniversalSegmentation.from_pretrained(root / folder / name).eval()
    with torch.no_grad():
        expected = model(**load_file(root / "inputs.safetensors"))
    for field in ("class_queries_logits", "masks_queries_logits", "valid_extent"):
        torch.testing.assert_close(outputs[f"{name}.{field}"], expected[field], rtol=1e-5, atol=tolerance)


def test_the_base_model_and_the_processor_give_the_same(root, outputs):
    folder = root / "models" / MAIN
    base = HfMaskFormerModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = base(**load_file(root / "inputs.safetensors")).last_hidden_state
    torch.testing.assert_close(outputs["base.last_hidden_state"], expected, rtol=1e-5, atol=1e-6)
    processor = HfMaskFormerImageProcessor.from_pretrained(folder)
    assert torch.equal(outputs["pixel_values"], processor(Image.open(root / "image.png"))["pixel_values"])


def test_the_pipeline_gives_the_same(root, report):
    segments = pipeline("image-segmentation", model=str(root / "models" / MAIN), device="cpu")(str(root / "image.png"))
    assert segments
    assert [label for label, _ in report["segments"]] == [segment["label"] for segment in segments]
    scores = [segment["score"] for segment in segments]
    assert [score for _, score in report["segments"]] == pytest.approx(scores, abs=1e-5)


def test_the_code_really_came_from_the_directory(report, timm_report):
    assert timm_report["loaded_though_blocked"] == []
    assert report["loaded_though_blocked"] == []
    for name, class_name in report["classes"].items():
        assert class_name.startswith("transformers_modules."), f"{name}: {class_name}"


def test_nothing_was_logged(report):
    assert report["lines"] == []
    for word in ("not supported", "Do you wish", "Error", "error"):
        assert word not in report["stderr"]


def test_saving_there_keeps_the_code_and_the_auto_map(root, report, outputs):
    first, again = root / "models" / MAIN, root / "models_again"
    assert json.loads((again / "config.json").read_text())["auto_map"] == AUTO_MAP
    processor_map = json.loads((again / "preprocessor_config.json").read_text())["auto_map"]
    assert processor_map == {"AutoImageProcessor": AUTO_MAP["AutoImageProcessor"]}
    code = {path.name: path.read_text() for path in first.glob("*.py")}
    assert {path.name: path.read_text() for path in again.glob("*.py")} == code
    assert torch.equal(outputs["again.class_queries_logits"], outputs[f"{MAIN}.class_queries_logits"])


def test_the_directory_holds_every_module_that_is_imported(root):
    code = {path.stem for path in (root / "models" / MAIN).glob("*.py")}
    assert {"modeling_hf_maskformer", "configuration_hf_maskformer", "image_processing_hf_maskformer"} <= code
    assert {"backbone", "criterion", "matcher", "masks", "postprocess"} <= code
