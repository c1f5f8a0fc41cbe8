"""write a saved model as ONNX or torch.export file, checked against the model; smaller variants with their loss

hf-maskformer export runs/camvid/best --output-dir export
hf-maskformer export runs/camvid/best --output-dir export --variants int8 --dataset DIR   (calibrated and measured)
"""

import logging
from argparse import ArgumentParser, Namespace
from typing import Any

from hf_maskformer.cli.arguments import add_input_arguments, check_counts, check_output_folder, reader_options

logger = logging.getLogger(__name__)

MAIN_METRICS = {"semantic": "mean_iou", "instance": "map", "panoptic": "pq"}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory or Hub id that from_pretrained reads")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--format", choices=["onnx", "torch-export"], default="onnx")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[],
        choices=["fp16", "int8", "int8-dynamic"],
        help="further ONNX files: half precision (for GPUs), convolutions in 8 bits (calibrated on images), matrix "
        "products in 8 bits",
    )
    parser.add_argument(
        "--semantic-map",
        action="store_true",
        help="the program ends with the label of each pixel at the size of its input, not with logits",
    )
    parser.add_argument("--fixed-size", action="store_true", help="take images of the model's canvas only")
    parser.add_argument("--dataset", help="check, calibrate and measure with these images; default: built-in scenes")
    parser.add_argument("--split", default="val", help="split that variants are measured on")
    parser.add_argument("--calibration-split", default="train")
    parser.add_argument("--calibration-images", type=int, default=64)
    parser.add_argument("--limit", type=int, help="measure on the first LIMIT images only")
    add_input_arguments(parser)


def run(arguments: Namespace) -> None:
    check_counts(calibration_images=arguments.calibration_images, limit=arguments.limit)
    check_output_folder("--output-dir", arguments.output_dir)
    from hf_maskformer.data.load import load
    from hf_maskformer.export.export import export_model, write_record
    from hf_maskformer.inference.checkpoint import load_checkpoint

    model, processor = load_checkpoint(arguments.model)
    data = calibration_data = None
    if arguments.dataset is not None:
        options: dict[str, Any] = {"task": processor.task or model.config.task, **reader_options(arguments)}
        data = load(arguments.dataset, split=arguments.split, **options)
        if "int8" in arguments.variants:
            calibration_data = load(arguments.dataset, split=arguments.calibration_split, **options)
    elif "int8" in arguments.variants:
        logger.warning("int8 is calibrated on built-in scenes; for images of your own give --dataset")
    result = export_model(
        model,
        processor,
        arguments.output_dir,
        format=arguments.format,
        variants=arguments.variants,
        semantic_map=arguments.semantic_map,
        fixed_size=arguments.fixed_size,
        data=data,
        calibration_data=calibration_data,
        calibration_images=arguments.calibration_images,
    )
    sizes = "of any size" if result.record["free_size"] else "of {} x {} only".format(*result.record["image_size"])
    print(f"takes batches of images {sizes}; largest differences from the model: {words(result.record)}")
    if "largest_difference_in_last_digits" in result.record:
        print(
            "rounding decides there what a query sees; from the model's outputs for the same images with pixels "
            f"changed by a hundred-thousandth: {words(result.record, 'largest_difference_in_last_digits')}"
        )
    if arguments.variants:
        result.record["measured"] = measured(result.files, data, arguments.limit)
        write_record(result, arguments.output_dir)
    for name, path in result.files.items():
        print(f"{path}  {result.record['megabytes'][name]} MB{loss_words(result.record, name)}")


def words(record: dict[str, Any], key: str = "largest_difference") -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in record[key].items())


def measured(files: dict[str, Any], data: Any, limit: int | None) -> dict[str, Any]:
    """The main metric of each file on the data, or how far it agrees with float32 on built-in scenes."""
    from hf_maskformer.evaluation.evaluate import evaluate
    from hf_maskformer.export.agreement import equal_pixels
    from hf_maskformer.inference.checkpoint import load_checkpoint

    if data is None:
        reference, processor = load_checkpoint(files["float32"])
        shares = {name: equal_pixels(reference, load_checkpoint(path)[0], processor) for name, path in files.items()}
        return {"metric": "share of pixels of built-in scenes with the class that float32 gives", **shares}
    metric = MAIN_METRICS[data.task]
    scores = {}
    for name, path in files.items():
        model, processor = load_checkpoint(path)
        scores[name] = evaluate(model, processor, data, task=data.task, limit=limit, ignore_class_names=True)[metric]
    return {"metric": metric, **scores}


def loss_words(record: dict[str, Any], name: str) -> str:
    if "measured" not in record:
        return ""
    value, whole = record["measured"][name], record["measured"]["float32"]
    loss = "" if name == "float32" else f" ({value - whole:+.4f})"
    return f"  {record['measured']['metric']} {value:.4f}{loss}"
