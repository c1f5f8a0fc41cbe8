"""A small trained model and a folder of images, made once for all verbs."""

import json

import numpy as np
import pytest
from PIL import Image

from hf_maskformer.cli.main import main

TINY_BACKBONE = (
    "{model_type: resnet, depths: [1, 1, 1, 1], hidden_sizes: [8, 8, 16, 16], embedding_size: 8, layer_type: basic, "
    "out_features: [stage1, stage2, stage3, stage4]}"
)
TINY_RECIPE = f"""
preset: maskformer-light
config_overrides:
  backbone_config: {TINY_BACKBONE}
  image_size: [64, 64]
  pixel_decoder_dim: 16
  mask_dim: 16
  query_decoder_dim: 16
  query_decoder_ffn_dim: 32
  query_decoder_layers: 1
  query_decoder_heads: 2
  num_queries: 12
max_steps: 50
batch_size: 2
num_workers: 0
evaluations: 1
"""


@pytest.fixture(scope="session")
def semantic_folder(tmp_path_factory):
    """Two classes, left and right, as train and val splits of semantic maps."""
    root = tmp_path_factory.mktemp("semantic")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for part in ("images", "labels"):
            (root / split / part).mkdir(parents=True)
        for index in range(count):
            image = rng.integers(0, 90, (48, 64, 3), dtype=np.uint8)
            image[:, 32:] += 160
            Image.fromarray(image).save(root / split / "images" / f"{split}{index}.png")
            labels = np.repeat(np.arange(2, dtype=np.uint8), 32)[None].repeat(48, axis=0)
            Image.fromarray(labels).save(root / split / "labels" / f"{split}{index}.png")
    (root / "id2label.json").write_text(json.dumps({"0": "left", "1": "right"}))
    return root


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY_RECIPE)
    return path


@pytest.fixture(scope="session")
def trained(semantic_folder, recipe, tmp_path_factory):
    """The run of `hf-maskformer train` on the folder, with flags over the recipe."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    words = ["train", "--recipe", str(recipe), "--dataset", str(semantic_folder), "--output-dir", str(run)]
    words += ["--max-steps", "2", "--dataset-options", f"cache_dir={run.parent / 'cache'}"]
    words += ["--val-dataset-options", f"cache_dir={run.parent / 'cache'}"]
    assert main(words) == 0
    return run
