"""evaluate a saved model on one split of a dataset, at the images' original size

hf-maskformer evaluate runs/camvid/best --dataset DIR --split val --task semantic --json metrics.json
"""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from hf_maskformer.cli.arguments import add_input_arguments, reader_options
from hf_maskformer.training.config import key_values


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory or Hub id that from_pretrained reads")
    parser.add_argument("--dataset", required=True, help="dataset folder, or 'scenes' for the built-in drawn scenes")
    parser.add_argument("--split", default="val")
    parser.add_argument("--task", choices=["semantic", "instance", "panoptic"], help="default: the model's task")
    parser.add_argument("--format", help="dataset format; default: found from the folder's shape")
    parser.add_argument("--dataset-options", nargs="+", default=[], metavar="KEY=VALUE", help="options of the reader")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--limit", type=int, help="evaluate the first LIMIT images only")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--json", metavar="FILE", help="write the metrics as one JSON object")
    parser.add_argument("--on-bad-sample", choices=["raise", "skip"], default="raise", help="for unreadable images")
    add_input_arguments(parser)


def run(arguments: Namespace) -> None:
    import torch

    from hf_maskformer.data.load import load
    from hf_maskformer.evaluation.evaluate import evaluate
    from hf_maskformer.evaluation.table import format_table
    from hf_maskformer.inference.checkpoint import load_checkpoint

    model, processor = load_checkpoint(arguments.model)
    stored: dict[str, Any] = (
        {} if processor.intensity_range is None else {"intensity_range": tuple(processor.intensity_range)}
    )
    options = {**stored, **reader_options(arguments), **key_values(arguments.dataset_options)}
    options["on_bad_sample"] = arguments.on_bad_sample
    task = arguments.task or model.config.task
    data = load(arguments.dataset, split=arguments.split, task=task, format=arguments.format, **options)
    metrics = evaluate(
        model,
        processor,
        data,
        task=task,
        batch_size=arguments.batch_size,
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        limit=arguments.limit,
        on_bad_sample=arguments.on_bad_sample,
    )
    print(format_table(metrics, data.label_spec.id2label))
    if arguments.json:
        write_json(Path(arguments.json), metrics)


def write_json(path: Path, metrics: dict[str, Any]) -> None:
    """One flat object; nan (a class that is absent) becomes null."""
    from hf_maskformer.training.trackers import json_ready

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(json_ready(metrics), indent=2) + "\n")
