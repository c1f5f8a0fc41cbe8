"""what is in a dataset and what is wrong with it: format, class table, sizes, problems, 8 overlays in one PNG

hf-maskformer inspect-dataset DIR

Every file is read. Exit code: 0, also where problems were found; with --strict 1 if there is one that training would
stop at, or images of more than 8 bits without --intensity-range; 2 for a folder that is no dataset. All problems and
numbers are in the JSON file, the screen shows the first.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_maskformer.cli.arguments import add_input_arguments, check_output_file, check_output_folder, reader_options
from hf_maskformer.training.option_values import key_values

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from hf_maskformer.data.picture_choice import Picture

SHEET_WIDTH = 2560  # pixels, of four pictures in a row, or two where there are four or fewer
MIN_SIDE = 480  # pixels; smaller pictures are enlarged, so that names can be read in them
MAX_ENLARGED_SIDE = 2560  # pixels; a narrow picture is enlarged no further
ALPHA = 0.45  # opacity of the colours
STRIPE_WIDTH = 6  # of the pattern over void pixels


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DIR", help="dataset folder, or the id of a data set on the Hub")
    parser.add_argument("--split", help="only this split; default: all")
    parser.add_argument("--task", choices=["semantic", "instance", "panoptic"], help="only formats that serve it")
    parser.add_argument("--format", help="only this format; default: all that the folder has")
    parser.add_argument("--dataset-options", nargs="+", default=[], metavar="KEY=VALUE", help="options of the reader")
    parser.add_argument("--output-dir", default="inspection", help="folder of the two files (default: inspection)")
    parser.add_argument("--json", metavar="FILE", help="default: <dataset's name>.json in the output folder")
    parser.add_argument("--overlays", metavar="FILE", help="default: <dataset's name>.png in the output folder")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if training would stop at a problem")
    add_input_arguments(parser)


def run(arguments: Namespace) -> None:
    check_output_folder("--output-dir", arguments.output_dir)
    check_output_file("--json", arguments.json)
    check_output_file("--overlays", arguments.overlays)
    from hf_maskformer.data.inspection import inspect_dataset
    from hf_maskformer.data.inspection_table import format_report
    from hf_maskformer.evaluation.json_format import write_json

    options = {**reader_options(arguments), **key_values(arguments.dataset_options)}
    report = inspect_dataset(
        arguments.dataset, split=arguments.split, format=arguments.format, task=arguments.task, **options
    )
    has_range = options.get("intensity_range") is not None
    print(format_report(report, has_range))

    output, name = Path(arguments.output_dir), Path(arguments.dataset).resolve().name
    numbers = Path(arguments.json or output / f"{name}.json")
    write_json(numbers, report.to_dict())
    written = f"\nnumbers and all problems: {numbers}"
    if report.pictures:
        overlays = Path(arguments.overlays or output / f"{name}.png")
        overlays.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(report.pictures, options.get("intensity_range")).save(overlays)
        written += f"   overlays: {overlays}"
    print(written)
    needs_range = not has_range and any(split.deep_modes for split in report.splits)
    if arguments.strict and (report.errors or needs_range):
        raise SystemExit(1)


def draw_sheet(pictures: "tuple[Picture, ...]", intensity_range: tuple[float, float] | None = None) -> "Image":
    """All pictures in one, with their files' names above."""
    from hf_maskformer.visualize import contact_sheet

    titles = [f"{picture.split}: {picture.file.name}" if picture.split else picture.file.name for picture in pictures]
    overlays = [draw_picture(picture, intensity_range) for picture in pictures]
    columns = 4 if len(pictures) > 4 else 2
    return contact_sheet(overlays, columns=columns, titles=titles, cell_width=SHEET_WIDTH // columns)


def draw_picture(picture: "Picture", intensity_range: tuple[float, float] | None = None) -> "Image":
    """The image with its segments; void pixels are striped where every pixel should have a class."""
    from hf_maskformer.data.inspection import DENSE_FORMATS
    from hf_maskformer.visualize import draw_segments

    image, ids, segments = picture_parts(picture, intensity_range)
    image, ids = enlarge(image, ids)
    if picture.format in DENSE_FORMATS:
        image = stripe(image, ids == 0)
    return draw_segments(image, ids, segments, picture.label_spec.id2label, alpha=ALPHA)


def picture_parts(
    picture: "Picture", intensity_range: tuple[float, float] | None
) -> "tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]":
    """(H, W, 3) image, (H, W) segment ids with 0 = void, segments."""
    import numpy as np

    from hf_maskformer.data.segmentation_data import layered_segments
    from hf_maskformer.data.volumes import label_slice

    if picture.format == "volumes":
        grey, labels = label_slice(picture.source)
        known = [int(label) for label in np.unique(labels) if label in picture.label_spec.id2label]
        segments = [{"id": label + 1, "label_id": label} for label in known if label != picture.source.commonest]
        return np.repeat(grey[..., None], 3, axis=2), labels + 1, segments
    infos, on_top = layered_segments(picture.source)
    spec = picture.label_spec
    # Colours follow the ids: stuff gets one for each class, the same in all pictures, and things the next free ones.
    stuff = [info["label_id"] not in spec.thing_label_ids for info in infos]
    ids = [
        1 + (info["label_id"] if flat else spec.num_labels + k)
        for k, (info, flat) in enumerate(zip(infos, stuff, strict=True))
    ]
    segmentation = np.array([0, *ids], dtype=np.int32)[on_top]
    drawn = {number: {"id": number, "label_id": info["label_id"]} for number, info in zip(ids, infos, strict=True)}
    content = picture.source["image"]["bytes"]
    return read_picture(picture.file, intensity_range, content), segmentation, list(drawn.values())


def read_picture(
    path: Path, intensity_range: tuple[float, float] | None, content: bytes | None = None
) -> "np.ndarray":
    """(H, W, 3) uint8; a deep image without a stated range is shown from its least to its largest value.

    `content` is that of the file, where there is none.
    """
    import io

    from hf_maskformer.data.sample import image_to_rgb
    from hf_maskformer.model.image_conversion import open_image, pil_to_array

    image = open_image(path) if content is None else open_image(io.BytesIO(content), str(path))
    values = pil_to_array(image, str(path))
    if intensity_range is None and values.ndim == 2:
        low, high = float(values.min()), float(values.max())
        intensity_range = (low, high if high > low else low + 1)
    return image_to_rgb(image, str(path), intensity_range)


def enlarge(image: "np.ndarray", ids: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """Image and ids repeated a whole number of times, so that the shorter side has `MIN_SIDE` pixels or more.

    Fewer times where the longer side would be above `MAX_ENLARGED_SIDE`.
    """
    factor = max(1, min(-(-MIN_SIDE // min(ids.shape)), MAX_ENLARGED_SIDE // max(ids.shape)))
    return image.repeat(factor, axis=0).repeat(factor, axis=1), ids.repeat(factor, axis=0).repeat(factor, axis=1)


def stripe(image: "np.ndarray", void: "np.ndarray") -> "np.ndarray":
    """Dark diagonal stripes over the pixels that have no segment."""
    import numpy as np

    diagonal = np.arange(void.shape[0])[:, None] + np.arange(void.shape[1])  # (H, W)
    dark = void & (diagonal // STRIPE_WIDTH % 2 == 0)
    return np.where(dark[..., None], image // 4, image)
