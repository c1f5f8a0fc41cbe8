"""Models of three classes to fine-tune, in memory and in folders."""

from pathlib import Path

import torch

from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.presets import image_processor_for, preset

OLD_NAMES = ("sky", "Traffic-Light", "road")


def config_of(tiny_run, **fields):
    labels = dict(enumerate(OLD_NAMES))
    overrides = {**tiny_run().config_overrides, "id2label": labels, "task": "semantic", "loss_pixel_weight": 1.0}
    return preset("maskformer-light", **{**overrides, **fields})


def checkpoint(tiny_run, folder: Path, seed=1, **fields) -> HfMaskFormerForUniversalSegmentation:
    """A stored model whose class head, queries and statistics are all random, and its processor."""
    torch.manual_seed(seed)
    model = HfMaskFormerForUniversalSegmentation(config_of(tiny_run, **fields))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    image_processor_for(model.config, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
    return model


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}
