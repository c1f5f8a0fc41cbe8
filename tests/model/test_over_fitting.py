"""Every preset learns four real images by heart: what a loss, a matcher or a merge gets wrong shows up as missing PQ.

Presets are narrowed, so that a step takes about a second on one core: their parts, and how these are put together,
stay, widths and depths shrink, and what works against learning by heart (dropout, frozen statistics) is off.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_maskformer.data.collate import Collator
from hf_maskformer.data.load import load
from hf_maskformer.data.sample import Sample
from hf_maskformer.evaluation.panoptic import PanopticQuality
from hf_maskformer.model.configuration_hf_maskformer import HfMaskFormerConfig
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.presets import PRESETS, image_processor_for, list_presets, preset


@dataclass(frozen=True)
class Pictures:
    """How large the images are, in pixels: a mask's border is as sharp as its cells are small beside the objects."""

    side: int
    photo: tuple[float, float, float, float]  # left, top, right, bottom of what is shown, in parts of the original
    nuclei: tuple[int, int, int, int]  # the same in pixels
    smallest: int  # pixels at the side; smaller pieces are void


# Masks have a cell for 4 pixels: the smallest piece has 6.
PICTURES = Pictures(side=192, photo=(0, 0, 1, 1), nuclei=(0, 0, 96, 96), smallest=100)
# Those of Panoptic SegFormer have one for 8. With pieces of 10 to 30 cells every segment was found and had its class,
# but the outlines alone, half a cell wide, kept PQ at 0.85.
COARSE_PICTURES = Pictures(side=384, photo=(0.33, 0.5, 0.67, 0.84), nuclei=(32, 160, 96, 224), smallest=4000)
STEPS, CHECK_EVERY = 800, 50
WANTED = 0.9
WIDTHS = [32, 64, 128, 256]
NARROW_BACKBONES: dict[str, dict[str, Any]] = {
    "resnet": {"depths": [2, 2, 2, 2], "hidden_sizes": WIDTHS, "embedding_size": 32},
    "pvt_v2": {"hidden_sizes": [32, 64, 160, 256], "depths": [2, 2, 2, 2], "drop_path_rate": 0.0},
    "swin": {"embed_dim": 32, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "drop_path_rate": 0.0},
}
NARROW: dict[str, Any] = {
    "backbone_freeze_batch_norm": False,
    "pixel_decoder_dim": 64,
    "pixel_decoder_layers": 2,
    "pixel_decoder_heads": 4,
    "pixel_decoder_ffn_dim": 256,
    "pixel_decoder_dropout": 0.0,
    "mask_dim": 64,
    "query_decoder_dim": 128,
    "query_decoder_heads": 4,
    "query_decoder_ffn_dim": 256,
    "query_decoder_layers": 3,
    "query_decoder_thing_mask_layers": 2,
    "query_decoder_stuff_mask_layers": 2,
    "query_decoder_dropout": 0.0,
    "query_decoder_attention_dropout": 0.0,
    "query_decoder_activation_dropout": 0.0,
    "criterion_points": 2048,
    "num_queries": 100,
    "task": "panoptic",
}


def pictures_of(name: str) -> Pictures:
    return COARSE_PICTURES if name.startswith("panoptic-segformer") else PICTURES


def narrow(name: str, **overrides: Any) -> HfMaskFormerConfig:
    fields = PRESETS[name].fields
    overrides["image_size"] = [pictures_of(name).side] * 2
    if "backbone" in fields:  # timm's are small as they are
        return preset(name, **{**NARROW, **overrides})
    small = {**fields["backbone_config"], **NARROW_BACKBONES[fields["backbone_config"]["model_type"]]}
    return preset(name, **{**NARROW, "backbone_config": small, **overrides})


def distinct_shapes() -> list[str]:
    """One preset for each narrowed shape; of what only depth or width told apart, the first."""
    shapes: dict[str, str] = {}
    for name in list_presets():
        fields = narrow(name, threshold=0.5).to_dict()
        shapes.setdefault(json.dumps(fields, sort_keys=True, default=str), name)
    return list(shapes.values())


def resized(sample: Sample, window: tuple[int, int, int, int], pictures: Pictures) -> Sample:
    """The window (left, top, right, bottom) of a sample at side x side."""
    side, smallest = pictures.side, pictures.smallest
    image = Image.fromarray(sample.image).resize((side, side), Image.Resampling.BILINEAR, box=window)
    masks = [
        np.asarray(Image.fromarray(mask).crop(window).resize((side, side), Image.Resampling.NEAREST))
        for mask in sample.masks
    ]
    keep = [index for index, mask in enumerate(masks) if mask.sum() >= smallest and not sample.iscrowd[index]]
    stacked = np.stack([masks[index] for index in keep])
    return Sample(np.asarray(image), stacked, sample.class_labels[keep], image_id=sample.image_id)


def real_images(shared_data: Path, cache: str, pictures: Pictures) -> tuple[list[Sample], dict[int, str], list[int]]:
    """Two photographs and two pictures of nuclei, the classes that occur in them, and which of these are things."""
    found: list[tuple[str, bool, Sample, int]] = []  # class, thing?, sample, label in the sample
    samples = []
    photographs = load(shared_data / "coco_panoptic_sample", split="examples", task="panoptic", cache_dir=cache)
    nuclei = load(shared_data / "nuclei", split="train", task="panoptic", cache_dir=cache)
    for data in (photographs, nuclei):
        for index in range(2):
            sample = data.sample(index)
            height, width = sample.image.shape[:2]
            left, top, right, bottom = pictures.photo
            shown = (int(left * width), int(top * height), int(right * width), int(bottom * height))
            window = shown if data is photographs else pictures.nuclei
            sample = resized(sample, window, pictures)
            samples.append(sample)
            spec = data.label_spec
            found += [
                (spec.id2label[label], label in spec.thing_label_ids, sample, place)
                for place, label in enumerate(sample.class_labels.tolist())
            ]
    names = sorted({name for name, *_ in found})
    for name, _, sample, place in found:
        sample.class_labels[place] = names.index(name)
    things = sorted({names.index(name) for name, thing, *_ in found if thing})
    assert sum(len(sample.class_labels) for sample in samples) >= 20
    return samples, dict(enumerate(names)), things


def reference(sample: Sample) -> dict[str, Any]:
    ids = np.zeros(sample.masks.shape[1:], dtype=np.int32)
    for index, mask in enumerate(sample.masks, start=1):
        ids[mask] = index
    segments = [{"id": index + 1, "label_id": int(label)} for index, label in enumerate(sample.class_labels)]
    return {"segmentation": ids, "segments_info": segments}


@pytest.mark.slow
@pytest.mark.parametrize("name", distinct_shapes())
def test_four_real_images_are_learned_by_heart(name, shared_data, tmp_path):
    samples, id2label, things = real_images(shared_data, str(tmp_path), pictures_of(name))
    label2id = {label: index for index, label in id2label.items()}
    torch.manual_seed(0)
    config = narrow(name, id2label=id2label, label2id=label2id, thing_label_ids=things)
    model = HfMaskFormerForUniversalSegmentation(config)
    processor = image_processor_for(config)
    batch = Collator(processor)(samples)
    inputs = {key: batch[key] for key in ("pixel_values", "pixel_mask", "mask_labels", "class_labels") if key in batch}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 1) * max(1 - step / STEPS, 0.05) ** 0.9
    )
    history = []
    for step in range(1, STEPS + 1):
        model.train()
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % CHECK_EVERY == 0:
            history.append(round(quality(model, processor, inputs, samples, things), 3))
            print(f"{name}: step {step}, loss {loss.item():.3f}, PQ {history[-1]}", flush=True)
            if history[-1] > WANTED:
                return
    pytest.fail(f"PQ stayed below {WANTED} in {STEPS} steps: {history}")


def quality(model: Any, processor: Any, inputs: dict[str, Any], samples: list[Sample], things: list[int]) -> float:
    model.eval()
    with torch.inference_mode():
        outputs = model(pixel_values=inputs["pixel_values"], pixel_mask=inputs.get("pixel_mask"))
    sizes = [sample.masks.shape[1:] for sample in samples]
    results = processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes)
    metric = PanopticQuality(things, num_labels=len(model.config.id2label))
    return metric.update(results, [reference(sample) for sample in samples]).compute()["pq"]
