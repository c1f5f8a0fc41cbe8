"""Invariants 2 and 3 of the design: the loss does not depend on how 8 images are spread; padding has no say."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_maskformer import HfMaskFormerConfig, HfMaskFormerForUniversalSegmentation
from hf_maskformer.model.layers import resize_padding
from model.distributed_worker import MODELS, build_model

WORKER = Path(__file__).with_name("distributed_worker.py")
TOLERANCE = 1e-9


def train(folder: Path, name: str, *, processes: int = 1, accumulation: int = 1, factor: float = 1.0) -> dict:
    out = folder / f"{name}.safetensors"
    command = [sys.executable, str(WORKER), str(out), str(accumulation), str(factor)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(variable, None)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = [
        subprocess.Popen(
            command,
            env={**environment, **({"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} if processes > 1 else {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
    return load_file(out)


def largest_difference(a: dict, b: dict, prefix: str) -> float:
    names = [name for name in a if name.startswith(prefix) and a[name].is_floating_point()]
    assert names
    return max((a[name] - b[name]).abs().max().item() for name in names)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs"), "one")


@pytest.fixture(
    scope="module",
    params=[{"processes": 2}, {"accumulation": 4}, {"processes": 2, "accumulation": 2}],
    ids=str,
)
def other_arrangement(request, tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs"), "other", **request.param)


@pytest.mark.parametrize("model", MODELS)
def test_eight_images_are_the_same_step_however_they_are_spread(one_process, other_arrangement, model):
    assert (other_arrangement[f"{model}.losses"] - one_process[f"{model}.losses"]).abs().max() < TOLERANCE
    # After the first step: the learning rate times the gradients.
    for step in ("step0", "step9"):
        assert largest_difference(other_arrangement, one_process, f"{model}.{step}.") < TOLERANCE
    start = {f"{model}.start.{name}": value for name, value in build_model(model).state_dict().items()}
    moved = largest_difference(renamed(one_process, f"{model}.step9.", f"{model}.start."), start, f"{model}.start.")
    assert moved > 1e-3


def renamed(tensors: dict, prefix: str, other: str) -> dict:
    return {other + name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def test_the_comparison_notices_a_loss_times_two(one_process, tmp_path):
    doubled = train(tmp_path, "doubled", factor=2.0)
    for model in MODELS:
        assert abs(doubled[f"{model}.losses"][0] - one_process[f"{model}.losses"][0]) > 0.1
        assert largest_difference(doubled, one_process, f"{model}.step0.") > 1e-4


# --- invariant 3 -----------------------------------------------------------------------------------------------------


# The parts of each arrangement; and the strides of the maps that its query decoder looks at.
ARRANGEMENTS = {
    "fpn": {},
    "fpn_transformer": {"pixel_decoder": "fpn_transformer"},
    "light": {"pixel_decoder": "light"},
    "mask2former": MODELS["mask2former"],
    "panoptic-segformer": MODELS["panoptic-segformer"],
}
STRIDES = {"mask2former": (8, 16, 32), "panoptic-segformer": (8, 16, 32, 64)}


def small_model(arrangement: str = "fpn", seed: int = 0) -> HfMaskFormerForUniversalSegmentation:
    torch.manual_seed(seed)
    backbone = {
        "model_type": "resnet",
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [8, 16, 24, 32],
        "embedding_size": 8,
        "layer_type": "basic",
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    config = HfMaskFormerConfig(
        backbone_config=backbone,
        pixel_decoder_dim=32,
        pixel_decoder_layers=2,
        pixel_decoder_ffn_dim=32,
        mask_dim=16,
        query_decoder_dim=32,
        query_decoder_heads=4,
        query_decoder_ffn_dim=32,
        query_decoder_layers=2,
        num_queries=6,
        num_labels=3,
        **ARRANGEMENTS[arrangement],
    )
    return HfMaskFormerForUniversalSegmentation(config).eval()


def with_noise(level: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """A map (B, C, h, w) with noise in the cells that are padding, by pixels (B, H, W)."""
    cells = resize_padding(padding, level.shape[-2:])[:, None]
    return torch.where(cells, 100 * torch.randn_like(level), level)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_batch_neighbours_have_no_influence_on_one_canvas(arrangement):
    """3a: alone = in a batch of 3; in float64, as a mask value near 0 or 1 multiplies its rounding in its logit."""
    model = small_model(arrangement).double()
    pixels = torch.randn(3, 3, 96, 128, dtype=torch.float64)
    mask = torch.ones(3, 96, 128, dtype=torch.int64)
    mask[0, 60:], mask[1, :, 70:] = 0, 0
    pixels = pixels * mask[:, None]
    with torch.no_grad():
        together = model(pixels, mask)
        for index in range(3):
            alone = model(pixels[index : index + 1], mask[index : index + 1])
            for field in ("class_queries_logits", "masks_queries_logits", "valid_extent"):
                torch.testing.assert_close(alone[field][0], together[field][index], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("extent", [(64, 96), (68, 100), (90, 128)])  # also where coarse cells hold a part of both
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_attention_ignores_what_stands_in_the_padding(arrangement, extent):
    """3b: given the feature maps, noise in their padded cells changes no class logit and no valid mask logit."""
    model = small_model(arrangement).model
    padding = torch.zeros(1, 128, 128, dtype=torch.bool)
    padding[:, extent[0] :], padding[:, :, extent[1] :] = True, True
    strides = STRIDES.get(arrangement, (32,))
    channels = model.pixel_decoder.memory_channels[-len(strides) :]
    memory = [torch.randn(1, width, 128 // s, 128 // s) for width, s in zip(channels, strides, strict=True)]
    noisy = [with_noise(level, padding) for level in memory]
    mask_features = torch.randn(1, model.config.mask_dim, 32, 32)
    noisy_features = with_noise(mask_features, padding)
    heads = {"class_head": model.class_head, "mask_head": model.mask_head, "all_layers": True}
    with torch.no_grad():
        clean = model.query_decoder(memory, mask_features, padding, **heads)
        dirty = model.query_decoder(noisy, noisy_features, padding, **heads)
        unmasked = model.query_decoder(noisy, noisy_features, None, **heads)
    for before, after in zip(clean, dirty, strict=True):
        torch.testing.assert_close(after.class_logits, before.class_logits, atol=1e-6, rtol=0)
        valid_masks = (part.mask_logits[:, :, : extent[0] // 4, : extent[1] // 4] for part in (after, before))
        torch.testing.assert_close(*valid_masks, atol=1e-6, rtol=0)
    assert (unmasked[-1].class_logits - clean[-1].class_logits).abs().max() > 1e-3  # the mask is what protects


@pytest.mark.parametrize("arrangement", STRIDES)
def test_deformable_encoder_ignores_padding(arrangement, monkeypatch):
    """Given its maps: the norms of the projections before it see the padding."""
    decoder, strides = small_model(arrangement).model.pixel_decoder, STRIDES[arrangement]
    with torch.no_grad():  # look further, and differently from query to query, than at the start
        for layer in decoder.layers:
            layer.self_attention.sampling_offsets.weight.normal_(std=0.3)
            layer.self_attention.attention_weights.weight.normal_(std=0.3)
    padding = torch.zeros(2, 128, 128, dtype=torch.bool)
    padding[0, 64:], padding[1, :, 96:] = True, True
    maps = [
        torch.randn(2, width, 128 // s, 128 // s) for width, s in zip(decoder.memory_channels, strides, strict=True)
    ]
    noisy = [with_noise(level, padding) for level in maps]
    encoded = []
    for levels, mask in ((maps, padding), (noisy, padding), (noisy, None)):
        monkeypatch.setattr(decoder, "_project", lambda features, levels=levels: levels[::-1])
        with torch.no_grad():
            encoded.append(decoder.encode([], mask))
    clean, dirty, unmasked = encoded
    for before, after, blind in zip(clean, dirty, unmasked, strict=True):
        valid = ~resize_padding(padding, before.shape[-2:])[:, None].expand_as(before)
        torch.testing.assert_close(after[valid], before[valid], atol=1e-6, rtol=0)
        assert (blind[valid] - before[valid]).abs().max() > 1e-2


@pytest.mark.parametrize("arrangement", ["fpn_transformer", "light"])
def test_encoder_of_the_pixel_decoder_ignores_padding(arrangement):
    decoder = small_model(arrangement).model.pixel_decoder
    padding = torch.zeros(1, 128, 128, dtype=torch.bool)
    padding[:, 64:] = True
    features = [
        torch.randn(1, width, 128 // s, 128 // s) for width, s in zip((8, 16, 24, 32), (4, 8, 16, 32), strict=True)
    ]
    noisy = [feature.clone() for feature in features]
    noisy[-1][:, :, 2:] = 100 * torch.randn_like(noisy[-1][:, :, 2:])
    with torch.no_grad():
        clean, dirty = decoder(features, padding)[1][-1], decoder(noisy, padding)[1][-1]
    torch.testing.assert_close(dirty[:, :, :2], clean[:, :, :2], atol=1e-6, rtol=0)


def test_valid_extent_is_the_unpadded_share():
    model = small_model()
    mask = torch.zeros(2, 64, 96, dtype=torch.int64)
    mask[0, :48], mask[1, :, :33] = 1, 1
    with torch.no_grad():
        extent = model(torch.zeros(2, 3, 64, 96), mask).valid_extent
    torch.testing.assert_close(extent, torch.tensor([[0.75, 1.0], [1.0, 33 / 96]]))
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 64, 96)).valid_extent is None


def test_position_codes_of_a_padded_image_equal_those_of_the_unpadded_one():
    encoding = small_model().model.query_decoder.position_encoding
    padding = torch.zeros(1, 6, 7, dtype=torch.bool)
    padding[:, 4:], padding[:, :, 5:] = True, True
    padded = encoding(6, 7, padding=padding, device=torch.device("cpu")).unflatten(1, (6, 7))[:, :4, :5]
    plain = encoding(4, 5, padding=None, device=torch.device("cpu")).unflatten(1, (4, 5))
    torch.testing.assert_close(padded, plain)
