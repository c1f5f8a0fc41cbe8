"""Trains tiny models for 10 SGD steps in float64 with the trainer's own step, in one of several arrangements.

    python tests/model/distributed_worker.py OUT ACCUMULATION [FACTOR]

RANK, WORLD_SIZE and MASTER_* choose processes. Every arrangement sees the same 8 images a step. FACTOR scales the
normaliser, to show that the comparison would notice.
"""

import sys

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from hf_maskformer import HfMaskFormerConfig, HfMaskFormerForUniversalSegmentation
from hf_maskformer.training.train import training_step

IMAGES, STEPS, QUERIES = 8, 10, 5
# Targets of the 8 images: unequal, more than queries, and the last four (rank 1 of 2) without any in even steps.
COUNTS = ((3, 1, 7, 2, 0, 0, 0, 0), (1, 0, 2, 4, 5, 1, 0, 6))


# What differs in each model: the family's three criteria.
MODELS = {
    "maskformer": {"loss_pixel_weight": 0.5},
    "mask2former": {
        "pixel_decoder": "deformable",
        "query_decoder": "masked",
        "criterion": "points",
        "criterion_points": 64,
        "loss_mask_weight": 5.0,
    },
    "panoptic-segformer": {
        "pixel_decoder": "deformable_memory",
        "query_decoder": "location",
        "criterion": "location",
        "mask_head": "none",
        "class_head": "none",
        "class_activation": "sigmoid",
        "query_decoder_thing_mask_layers": 1,
        "query_decoder_stuff_mask_layers": 2,
        "thing_label_ids": [0, 2],
    },
}


def build_model(name: str = "maskformer") -> HfMaskFormerForUniversalSegmentation:
    torch.manual_seed(0)
    backbone = {
        "model_type": "resnet",
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [4, 8, 8, 8],
        "embedding_size": 4,
        "layer_type": "basic",
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    config = HfMaskFormerConfig(
        backbone_config=backbone,
        backbone_freeze_batch_norm=True,
        pixel_decoder_dim=8,
        pixel_decoder_heads=2,
        pixel_decoder_layers=1,
        pixel_decoder_ffn_dim=8,
        pixel_decoder_dropout=0.0,
        mask_dim=8,
        query_decoder_dim=8,
        query_decoder_heads=2,
        query_decoder_ffn_dim=8,
        query_decoder_layers=2,
        query_decoder_dropout=0.0,
        query_decoder_attention_dropout=0.0,
        query_decoder_activation_dropout=0.0,
        num_queries=QUERIES,
        num_labels=3,
        **MODELS[name],
    )
    return HfMaskFormerForUniversalSegmentation(config).double()


def image(step: int, index: int) -> dict:
    generator = torch.Generator().manual_seed(1000 * step + index)
    count = COUNTS[step % 2][index]
    return {
        "pixel_values": torch.randn(3, 64, 64, generator=generator, dtype=torch.float64),
        "pixel_mask": torch.ones(64, 64, dtype=torch.int64),
        "mask_labels": torch.rand(count, 64, 64, generator=generator) > 0.5,
        "class_labels": torch.randint(0, 3, (count,), generator=generator),
        "image_ids": f"{step}-{index}",
    }


def collate(images: list[dict]) -> dict:
    stacked = {"pixel_values", "pixel_mask"}
    return {
        name: torch.stack([item[name] for item in images]) if name in stacked else [item[name] for item in images]
        for name in images[0]
    }


def main(out: str, accumulation: int, factor: float = 1.0) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    saved = {}
    for name in MODELS:
        saved |= {f"{name}.{key}": value for key, value in trained(accelerator, name, accumulation, factor).items()}
    if accelerator.is_main_process:
        save_file(saved, out)
    accelerator.end_training()


def trained(accelerator: Accelerator, name: str, accumulation: int, factor: float) -> dict[str, torch.Tensor]:
    """The losses of all steps, and the weights after the first and the last."""
    model = build_model(name)
    if factor != 1.0:
        honest = model.loss_normalizer
        model.loss_normalizer = lambda *args, **kwargs: honest(*args, **kwargs) / factor
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    share = IMAGES // (accelerator.num_processes * accumulation)
    losses = []
    saved = {}
    for step in range(STEPS):
        first = accelerator.process_index * IMAGES // accelerator.num_processes
        window = [
            collate([image(step, first + part * share + i) for i in range(share)]) for part in range(accumulation)
        ]
        values = training_step(accelerator, model, optimizer, window, step=step, max_grad_norm=None)
        losses.append(values["loss"])
        if step in (0, STEPS - 1):
            state = accelerator.unwrap_model(model).state_dict()
            saved |= {f"step{step}.{key}": tensor.clone() for key, tensor in state.items()}
    return {**saved, "losses": torch.tensor(losses, dtype=torch.float64)}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *(float(value) for value in sys.argv[3:]))
