"""segment images with a saved model: overlay PNG, label or panoptic PNG, segments.json (COCO RLE)

hf-maskformer predict runs/camvid/best photo.jpg folder/ --output-dir predictions
"""

import logging
from argparse import ArgumentParser, Namespace
from pathlib import Path

from hf_maskformer.cli.arguments import add_input_arguments, check_device, check_output_folder, intensity_range

logger = logging.getLogger(__name__)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory or Hub id that from_pretrained reads")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--task", choices=["semantic", "instance", "panoptic"], help="default: the model's task")
    parser.add_argument(
        "--merge",
        choices=["argmax", "mask_wise"],
        help="masks to panoptic segments; default: as stored with the model",
    )
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--on-bad-sample", choices=["raise", "skip"], default="raise", help="for unreadable images")
    add_input_arguments(parser)


def run(arguments: Namespace) -> None:
    images = image_files(arguments.images)
    values = intensity_range(arguments)
    check_output_folder("--output-dir", arguments.output_dir)
    check_device(arguments.device)
    from tqdm.auto import tqdm

    from hf_maskformer.inference.frames import UniqueNames
    from hf_maskformer.inference.predictor import Predictor

    predictor = Predictor(
        arguments.model,
        task=arguments.task,
        device=arguments.device,
        merge=arguments.merge,
        intensity_range=values,
    )
    output = Path(arguments.output_dir)
    names = UniqueNames()
    written = 0
    for index, path in enumerate(tqdm(images, desc="predict", unit="image")):
        name = names.name(path, index)  # also of an image that is skipped: the others keep theirs
        try:
            (result,) = predictor([path])
        except ValueError as error:
            if arguments.on_bad_sample == "raise":
                raise
            logger.warning("skipped: %s", error)
            continue
        result.save(output, stem=name)
        written += 1
    print(f"{written} of {len(images)} images segmented, results in {output}")


def image_files(given: list[str]) -> list[Path]:
    """The files named, and every image directly inside the folders named, sorted.

    Raises:
        ValueError: a path that does not exist, or a folder without an image.
    """
    from hf_maskformer.inference.frames import folder_images

    files: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            files += folder_images(path)
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"image {path} does not exist")
    return list(dict.fromkeys(files))
