"""A model and a run small enough for a test: seconds on one core."""

import pytest

from hf_maskformer.training.config import TrainConfig

TINY_MODEL = {
    "backbone_config": {
        "model_type": "resnet",
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 8, 16, 16],
        "embedding_size": 8,
        "layer_type": "basic",
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "image_size": [64, 64],
    "pixel_decoder_dim": 16,
    "mask_dim": 16,
    "query_decoder_dim": 16,
    "query_decoder_ffn_dim": 32,
    "query_decoder_layers": 2,
    "query_decoder_heads": 2,
    "num_queries": 12,
}


@pytest.fixture
def tiny_run(tmp_path):
    """Make the configuration of a run on built-in scenes; keywords change its fields."""

    def make(name="run", **changes):
        scenes = {"image_size": 64}
        fields = {
            "dataset": "scenes",
            "output_dir": str(tmp_path / name),
            "dataset_options": {**scenes, "length": 6},
            "val_dataset_options": {**scenes, "length": 2},
            "config_overrides": TINY_MODEL,
            "max_steps": 4,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "num_workers": 0,
            "evaluations": 1,
            "num_samples": 2,
            "log_every": 1,
            "checkpoint_every": 2,
        }
        return TrainConfig(**{**fields, **changes})

    return make
