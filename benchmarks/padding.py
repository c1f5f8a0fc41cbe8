"""What padding costs: the same model and images on canvases that leave no, some and much padding.

    python benchmarks/padding.py MODEL --data DIR [--limit N]

Attention, criterion and post-processing ignore padding exactly; convolutions and norms see it as black border. So a
result may depend on the canvas, and this table says how much. Images keep their size on every canvas.
"""

import argparse
import json
from pathlib import Path

from hf_maskformer.data.load import load
from hf_maskformer.evaluation.evaluate import evaluate
from hf_maskformer.inference.checkpoint import load_checkpoint
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor

KEYS = ("mean_iou", "pq", "map")
FACTORS = (1.0, 1.25, 1.5)  # of the canvas's sides to the largest image's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, help="first images only")
    parser.add_argument("--json", type=Path, default=Path(__file__).resolve().parent / "results" / "padding.json")
    arguments = parser.parse_args()
    model, processor = load_checkpoint(arguments.model)
    data = load(arguments.data, split=arguments.split, task=model.config.task)
    count = min(len(data), arguments.limit or len(data))
    height = max(data.row(index)["height"] for index in range(count))
    width = max(data.row(index)["width"] for index in range(count))
    rows = []
    for factor in FACTORS:
        canvas = {"height": round(height * factor), "width": round(width * factor)}
        # The size keeps every image as large as it is on the tight canvas; only the padding around it grows.
        fields = {**processor.to_dict(), "size": {"max_height": height, "max_width": width}, "pad_size": canvas}
        metrics = evaluate(model, HfMaskFormerImageProcessor.from_dict(fields), data, limit=count)
        rows.append({**canvas, **{key: metrics[key] for key in KEYS if key in metrics}})
        print(json.dumps(rows[-1]))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    report = {"model": model.config.model_type, "data": Path(arguments.data).name, "images": count, "rows": rows}
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
