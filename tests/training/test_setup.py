"""What a configuration passes on to the data and to the processor that is saved with the model."""

from pathlib import Path

import numpy as np
from PIL import Image

from hf_maskformer.training.config import TrainConfig
from hf_maskformer.training.setup import build_model, load_splits


def semantic_folder(root: Path) -> Path:
    """Three grey images of 16 bits with labels 0 and 1; the first image file is empty."""
    for part in ("images", "labels"):
        (root / "train" / part).mkdir(parents=True)
    deep = np.full((8, 8), 2047, dtype=np.uint16)
    for number in range(3):
        Image.fromarray(deep).save(root / "train" / "images" / f"{number}.png")
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(root / "train" / "labels" / f"{number}.png")
    (root / "train" / "images" / "0.png").write_bytes(b"")
    return root


def test_bad_samples_and_the_intensity_range_reach_data_and_processor(tmp_path: Path) -> None:
    config = TrainConfig(
        max_steps=1,
        preset="maskformer-light",
        dataset=str(semantic_folder(tmp_path / "set")),
        dataset_options={"cache_dir": str(tmp_path / "cache")},
        task="semantic",
        val_split=None,
        on_bad_sample="skip",
        intensity_range=(0, 4094),
    )
    data, _ = load_splits(config)
    assert len(data) == 2
    assert np.unique(data.image(0)).tolist() == [128]
    _, processor = build_model(config, data, None)
    assert processor.intensity_range == (0.0, 4094.0)
    assert np.all(processor(np.full((8, 8), 4094, dtype=np.uint16))["pixel_values"][0, 0, 0, 0].numpy() > 2)
