"""Parameters and multiply-adds of the presets beside the published ones.

    python benchmarks/complexity.py [--only mask2former-r50]

Multiply-adds are what the papers call FLOPs. Counted are convolutions, linear layers, matrix products and attention
of one forward pass in eval mode, by torch's own counter (halved: it counts a multiply-add as two operations), on the
meta device: nothing is computed, no weights are needed. Norms, activations, resizing and the reading of values in
deformable attention are not counted, as the papers' counter did not see its compiled operator either.

Two counts stand in the table. `ours` is what our forward pass does for the outputs of its last layer. The published
figures count more, and `as published` adds it by formula: in eval mode the official MaskFormer and Mask2Former also
make the masks of every earlier layer at 1/4 of the image (we make those that attention needs, at its resolution), and
their semantic inference, the product of class probabilities and masks at the size of the image, is counted as part of
the model. Panoptic SegFormer's code does neither.

MaskFormer's semantic models are counted on their crop (Table 1: 512 x 512, Swin-B 640 x 640). The COCO figures of the
papers are means over the first 100 validation images, short side 800, long side at most 1333; here it is one image of
the most frequent size, 480 x 640, which becomes 800 x 1067, padded to 800 x 1088 as the official models pad.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from training_rows import commit_of

from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.presets import preset

ROOT = Path(__file__).resolve().parent.parent
ADE20K = {"num_labels": 150}
COCO = {"num_labels": 133, "thing_label_ids": list(range(80))}
ALLOWED = {"parameters": 0.01, "as_published": 0.05}


@dataclass(frozen=True)
class Published:
    """Millions of parameters and thousands of millions of multiply-adds; None: not in the paper."""

    name: str
    source: str
    labels: dict[str, Any]
    size: tuple[int, int]
    parameters: float
    multiply_adds: float | None


CROP, LARGER_CROP, PHOTOGRAPH = (512, 512), (640, 640), (800, 1088)
MASKFORMER_ADE, MASKFORMER_COCO = "MaskFormer, Table 1", "MaskFormer, Table 3"
MASK2FORMER, PANOPTIC_SEGFORMER = "Mask2Former, Table 1", "Panoptic SegFormer, Tables 1 and 4"
PUBLISHED = (
    Published("maskformer-r50", MASKFORMER_ADE, ADE20K, CROP, 41, 53),
    Published("maskformer-swin-tiny", MASKFORMER_ADE, ADE20K, CROP, 42, 55),
    Published("maskformer-swin-small", MASKFORMER_ADE, ADE20K, CROP, 63, 79),
    Published("maskformer-swin-base", MASKFORMER_ADE, ADE20K, LARGER_CROP, 102, 195),
    Published("maskformer-r50-panoptic", MASKFORMER_COCO, COCO, PHOTOGRAPH, 45, 181),
    Published("mask2former-r50", MASK2FORMER, COCO, PHOTOGRAPH, 44, 226),
    Published("mask2former-r101", MASK2FORMER, COCO, PHOTOGRAPH, 63, 293),
    Published("mask2former-swin-tiny", MASK2FORMER, COCO, PHOTOGRAPH, 47, 232),
    Published("mask2former-swin-small", MASK2FORMER, COCO, PHOTOGRAPH, 69, 313),
    Published("mask2former-swin-base", MASK2FORMER, COCO, PHOTOGRAPH, 107, 466),
    Published("panoptic-segformer-r50", PANOPTIC_SEGFORMER, COCO, PHOTOGRAPH, 51.0, 214),
    Published("panoptic-segformer-pvtv2-b0", PANOPTIC_SEGFORMER, COCO, PHOTOGRAPH, 24.2, None),
    Published("panoptic-segformer-pvtv2-b2", PANOPTIC_SEGFORMER, COCO, PHOTOGRAPH, 43.6, None),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[row.name for row in PUBLISHED])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "complexity.json")
    arguments = parser.parse_args()
    rows = [counted(row) for row in PUBLISHED if arguments.only is None or row.name in arguments.only]
    print(table(rows))
    arguments.json.write_text(
        json.dumps({"commit": commit_of(ROOT), "allowed": ALLOWED, "rows": rows}, indent=2) + "\n"
    )


def counted(published: Published) -> dict[str, Any]:
    """Both counts of a preset, with the published ones and the differences as shares of these."""
    config = preset(published.name, **published.labels)
    with torch.device("meta"):
        model = HfMaskFormerForUniversalSegmentation(config).eval().requires_grad_(False)
        image = torch.empty(1, 3, *published.size)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(pixel_values=image)
    multiply_adds = counter.get_total_flops() / 2e9
    ours = {
        "parameters": (model.num_parameters() / 1e6, published.parameters),
        "as_published": (multiply_adds + published_extra(config, published.size), published.multiply_adds),
    }
    row: dict[str, Any] = {"preset": published.name, "source": published.source, "size": list(published.size)}
    row["multiply_adds"] = multiply_adds
    for name, (value, reported) in ours.items():
        row[name] = value
        row[f"{name}_reported"] = reported
        row[f"{name}_difference"] = None if reported is None else value / reported - 1
    return row


def published_extra(config: Any, size: tuple[int, int]) -> float:
    """Thousands of millions of multiply-adds that the official code does beside those of our forward pass."""
    if config.query_decoder == "location":
        return 0.0
    pixels = size[0] * size[1]
    # Mask2Former predicts before its first layer too, and so has one earlier prediction more.
    earlier = config.query_decoder_layers - (config.query_decoder == "standard")
    masks = earlier * config.num_queries * config.mask_dim * pixels / 16
    return (masks + config.num_queries * len(config.id2label) * pixels) / 1e9


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line a preset."""
    lines = [
        "| preset | image | parameters | published | difference "
        "| multiply-adds: ours | as published | published | difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"`{row['preset']}`", "x".join(str(side) for side in row["size"])]
        cells += [f"{row['parameters']:.1f}M", *reported(row, "parameters", "M")]
        cells += [f"{row['multiply_adds']:.0f}G", f"{row['as_published']:.0f}G", *reported(row, "as_published", "G")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def reported(row: dict[str, Any], name: str, unit: str) -> list[str]:
    figure, difference = row[f"{name}_reported"], row[f"{name}_difference"]
    return ["-", "-"] if figure is None else [f"{figure:g}{unit}", f"{difference:+.1%}"]


if __name__ == "__main__":
    main()
