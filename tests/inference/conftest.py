"""A tiny saved model with its processor, built once."""

import pytest
import torch

from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.presets import image_processor_for, preset

LABELS = {0: "sky", 1: "grass", 2: "crate"}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a panoptic model with random weights and a canvas of 64 x 64."""
    torch.manual_seed(0)
    config = preset(
        "maskformer-light", id2label=LABELS, thing_label_ids=[2], task="panoptic", image_size=[64, 64], num_queries=6
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    HfMaskFormerForUniversalSegmentation(config).save_pretrained(folder)
    image_processor_for(config).save_pretrained(folder)
    return folder
