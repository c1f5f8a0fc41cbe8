"""evaluate a saved model on one split of a dataset, at the images' original size

hf-maskformer evaluate runs/camvid/best --dataset DIR --split val --json metrics.json --report-dir report
accelerate launch --num_processes 2 -m hf_maskformer.cli.main evaluate MODEL --dataset DIR   (shares the images)
"""

import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_maskformer.cli.arguments import (
    add_input_arguments,
    check_counts,
    check_device,
    check_output_file,
    check_output_folder,
    dataset_options,
    reader_options,
)
from hf_maskformer.training.option_values import key_values

if TYPE_CHECKING:
    from accelerate import PartialState

    from hf_maskformer.data.segmentation_data import SegmentationData

TASKS = ("semantic", "instance", "panoptic")  # each needs less truth than the next
# By `data.sample.check_task`.
TASK_REFUSED = re.compile(r"task '\w+' is not possible with .*, allowed: ([\w, ]+)(; .*)?")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory or Hub id that from_pretrained reads")
    parser.add_argument(
        "--dataset", required=True, help="dataset folder, Hub id, or 'scenes' for the built-in drawn scenes"
    )
    parser.add_argument(
        "--split", default="val", help="'none' where the folder is itself the one split (default: val)"
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        help="default: the model's task; of official checkpoints, which store none, the dataset's",
    )
    parser.add_argument(
        "--merge",
        choices=["argmax", "mask_wise"],
        help="masks to panoptic segments; default: as stored with the model",
    )
    parser.add_argument("--format", help="dataset format; default: found from the folder's shape")
    parser.add_argument(
        "--dataset-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="options of the reader; a value may be a mapping, such as 'columns={image: photo}'",
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--limit", type=int, help="evaluate the first LIMIT images that can be indexed only")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--boundary", action="store_true", help="also measure the masks' boundaries")
    parser.add_argument("--json", metavar="FILE", help="write the metrics as one JSON object")
    parser.add_argument(
        "--report-dir",
        metavar="DIR",
        help="write tables, the confusion matrix, a score for every image and a sheet of the worst images",
    )
    parser.add_argument("--worst", type=int, default=8, help="images on the sheet of the report (default: 8)")
    parser.add_argument("--on-bad-sample", choices=["raise", "skip"], help="for unreadable images (default: raise)")
    parser.add_argument(
        "--ignore-class-names",
        action="store_true",
        help="take class k of the model for class k of the dataset although their names differ",
    )
    add_input_arguments(parser)


def run(arguments: Namespace) -> None:
    import torch
    from accelerate import PartialState

    check_arguments(arguments)
    from hf_maskformer.evaluation.details import EvaluationDetails
    from hf_maskformer.evaluation.evaluate import evaluate
    from hf_maskformer.inference.checkpoint import load_checkpoint

    details = None if arguments.report_dir is None else EvaluationDetails(worst=arguments.worst)
    given = key_values(arguments.dataset_options)
    options, on_bad_sample = dataset_options(given, arguments.on_bad_sample)
    model, processor = load_checkpoint(arguments.model)
    if processor.intensity_range is not None:
        options = {"intensity_range": tuple(processor.intensity_range), **options}
    options |= reader_options(arguments)
    task = arguments.task or processor.task
    data = load_data(arguments, task, on_bad_sample, options)
    processes = PartialState(cpu=arguments.device == "cpu" or not torch.cuda.is_available())
    metrics = evaluate(
        model,
        processor,
        data,
        task=task,
        batch_size=arguments.batch_size,
        device=arguments.device or processes.device,
        limit=arguments.limit,
        on_bad_sample=on_bad_sample,
        boundary=arguments.boundary,
        details=details,
        ignore_class_names=arguments.ignore_class_names,
        across_processes=processes.num_processes > 1,
        merge=arguments.merge,
    )
    if processes.is_main_process:
        publish(arguments, metrics, data, task or data.task, details)
    close(processes)


def check_arguments(arguments: Namespace) -> None:
    """Raises ValueError for flags that cannot be used, before anything is read."""
    check_counts(batch_size=arguments.batch_size, limit=arguments.limit)
    check_output_file("--json", arguments.json)
    check_output_folder("--report-dir", arguments.report_dir)
    check_device(arguments.device)


def load_data(
    arguments: Namespace, task: str | None, on_bad_sample: str, options: dict[str, Any]
) -> "SegmentationData":
    """The dataset; where it has no truth for the model's own task, the error says which --task is possible."""
    from hf_maskformer.data.load import load

    try:
        return load(
            arguments.dataset,
            split=None if arguments.split == "none" else arguments.split,
            task=task,
            format=arguments.format,
            on_bad_sample=on_bad_sample,
            **options,
        )
    except ValueError as error:
        refused = TASK_REFUSED.fullmatch(str(error))
        if refused is None or task is None or arguments.task is not None:
            raise
        possible = [name for name in TASKS[: TASKS.index(task)] if name in refused[1].split(", ")]
        if not possible:
            raise
        raise ValueError(f"{error}; {task} is the model's task: choose --task {' or '.join(possible)}") from error


def publish(arguments: Namespace, metrics: dict[str, Any], data: Any, task: str, details: Any) -> None:
    """Prints the table and writes the files that were asked for."""
    from hf_maskformer.evaluation.json_format import write_json
    from hf_maskformer.evaluation.table import format_table

    print(format_table(metrics, data.label_spec.id2label))
    if arguments.json:
        write_json(Path(arguments.json), metrics)
    if details is not None:
        from hf_maskformer.evaluation.report import write_report

        write_report(arguments.report_dir, metrics, data, task, details)
        print(f"report: {arguments.report_dir}")


def close(processes: "PartialState") -> None:
    """Ends the group of several processes; torch warns about one that is left open."""
    if processes.num_processes > 1:
        processes.destroy_process_group()
