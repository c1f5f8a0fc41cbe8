"""What `speed.py` measures around the network: images and maps to a batch, and a photo file to masks.

The peer of the processor is the faster one of transformers' two, MaskFormer's and Mask2Former's, both with their
default backend (torchvision).
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from speed_cases import PEER, Case, largest_difference, model_pair
from torch import Tensor, nn
from transformers import Mask2FormerImageProcessor, MaskFormerImageProcessor, pipeline

from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor

PEERS = (MaskFormerImageProcessor, Mask2FormerImageProcessor)
IMAGES, HEIGHT, WIDTH, SEGMENTS = 8, 480, 640, 20
LONGEST_EDGE = 2048
NUM_LABELS = 150
PHOTO_QUALITY = 90  # of the JPEG file
CANDIDATES = 20  # queries of 100 that find something in the photo
MARGIN_SPREAD = 100.0  # standard deviation over the queries of what the best class is above none
# None is what the pipeline passes by itself, for that our processor replaces by what is stored; 0.0: random masks lie
# one above another, and each keeps its visible part.
THRESHOLDS = {"threshold": 0.8, "mask_threshold": 0.4, "overlap_mask_area_threshold": 0.0}


def processor_case(size: int, *, maps: str | None, dtype: type[np.integer[Any]] = np.uint8, aim: float | None) -> Case:
    """8 images of 480x640, shortest edge `size`, with `maps` of "instances" (and a table of their labels each) or of
    "labels", 20 segments each, or without any."""
    random = np.random.default_rng(0)
    inputs: dict[str, Any] = {"images": [photo(HEIGHT, WIDTH, random) for _ in range(IMAGES)], "return_tensors": "pt"}
    if maps is not None:
        inputs["segmentation_maps"] = [segment_map(HEIGHT, WIDTH, random).astype(dtype) for _ in range(IMAGES)]
    if maps == "instances":
        labels = random.integers(0, NUM_LABELS, (IMAGES, SEGMENTS)).tolist()
        inputs["instance_id_to_semantic_id"] = [dict(enumerate(of_image, start=1)) for of_image in labels]
    settings = {"size": {"shortest_edge": size, "longest_edge": LONGEST_EDGE}}
    ours = partial(HfMaskFormerImageProcessor(**settings), **inputs)
    theirs = faster([partial(kind(**settings), **inputs) for kind in PEERS])

    def difference() -> float:
        return largest_difference(flat_batch(ours()), flat_batch(theirs()))

    what = "without maps" if maps is None else f"with maps of {SEGMENTS} {maps} ({np.dtype(dtype).name})"
    title = f"processor, {IMAGES} images {HEIGHT}x{WIDTH} {what}, shortest edge {size}"
    watched = () if maps is None else (torch.zeros(0),)  # the images are arrays: no tensor is there before the call
    return Case(title, {"ours": ours, PEER: theirs}, difference, allowed=1e-5, aim=aim, inputs=watched)


def pipeline_case(height: int, *, aim: float) -> Case:
    """`pipeline("image-segmentation")` from a JPEG file to a PIL mask for each segment; the same weights.

    `difference` is the part of the masks' pixels that differ. At their outlines they do: ours resizes logits,
    transformers probabilities, which for random masks, all outline, is more than for trained ones.
    """
    ours, theirs = model_pair("maskformer")
    folder = tempfile.TemporaryDirectory()  # stays as long as the calls below
    file = Path(folder.name) / "photo.jpg"
    Image.fromarray(photo(height, height * 16 // 9, np.random.default_rng(1))).save(file, quality=PHOTO_QUALITY)
    processor = MaskFormerImageProcessor()
    processor.save_pretrained(folder.name)
    make_certain(ours.model.class_head.projection, theirs, processor(images=[Image.open(file)], return_tensors="pt"))
    pairs = {"ours": (ours, HfMaskFormerImageProcessor.from_pretrained(folder.name)), PEER: (theirs, processor)}
    pipes = {
        side: pipeline("image-segmentation", model=model, image_processor=image_processor)
        for side, (model, image_processor) in pairs.items()
    }

    def results(side: str) -> list[dict[str, Any]]:
        return pipes[side](f"{folder.name}/photo.jpg", **THRESHOLDS)

    def difference() -> float:
        actual, expected = results("ours"), results(PEER)
        if len(expected) < 2 or [found["label"] for found in actual] != [found["label"] for found in expected]:
            return float("inf")
        both = zip(actual, expected, strict=True)
        return float(np.mean([np.asarray(one["mask"]) != np.asarray(other["mask"]) for one, other in both]))

    calls = {side: partial(results, side) for side in pipes}
    title = f"pipeline, MaskFormer Swin-T, a JPEG file of {height}x{height * 16 // 9} to its masks"
    return Case(title, calls, difference, allowed=2e-2, aim=aim)


@torch.inference_mode()
def make_certain(our_head: nn.Linear, theirs: nn.Module, features: Any) -> None:
    """Change the class weights of both sides so that `CANDIDATES` queries are certain of a class, the others of none,
    as in a trained model: with random weights nothing is found, and post-processing has nothing to do."""
    logits = theirs(**features).class_queries_logits[0]  # (Q, K + 1)
    margins = (logits[:, :-1].amax(1) - logits[:, -1]).sort(descending=True).values
    scale = MARGIN_SPREAD / margins.std()
    for head in (our_head, theirs.class_predictor):
        head.weight.mul_(scale)
        head.bias.mul_(scale)
        head.bias[-1] += scale * margins[CANDIDATES - 1 : CANDIDATES + 1].mean()


def faster(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """The call that takes less CPU time, by the better of three turns of each."""
    seconds = []
    for _ in range(3):
        for index, call in enumerate(calls):
            started = time.process_time()
            call()
            seconds.append((time.process_time() - started, index))
    return calls[min(seconds)[1]]


def flat_batch(batch: Any) -> tuple[Tensor, ...]:
    """Every tensor of a batch, as float32."""
    tensors = [batch["pixel_values"], batch["pixel_mask"]]
    tensors += [*batch.get("mask_labels", []), *batch.get("class_labels", [])]
    return tuple(tensor.float() for tensor in tensors)


def photo(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """(height, width, 3) uint8: coarse shapes, finer ones and grain, as large in a JPEG file as a photo is."""
    total = np.zeros((height, width, 3), dtype=np.float32)
    for cell, strength in ((160, 60), (40, 30), (8, 15)):
        small = random.normal(0, strength, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        layer = F.interpolate(torch.from_numpy(small).permute(2, 0, 1)[None], size=(height, width), mode="bicubic")
        total += layer[0].permute(1, 2, 0).numpy()
    total += random.normal(128, 4, total.shape)
    return total.clip(0, 255).astype(np.uint8)


def segment_map(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """(height, width) of 1..SEGMENTS: each pixel belongs to the nearest of as many random points."""
    points = random.random((SEGMENTS, 2)) * (height, width)
    rows, columns = np.mgrid[:height, :width]
    distances = [(rows - row) ** 2 + (columns - column) ** 2 for row, column in points]
    return np.argmin(distances, axis=0) + 1
