"""The formats: the tasks they have the truth for, the shapes of their folders, and where the parts of a split lie."""

from dataclasses import dataclass
from pathlib import Path

# The tasks that each format has the truth for, the default first.
FORMAT_TASKS: dict[str, tuple[str, ...]] = {
    "semantic_maps": ("semantic",),
    "coco_instance": ("instance", "semantic"),
    "coco_panoptic": ("panoptic", "instance", "semantic"),
    "cityscapes": ("panoptic", "instance", "semantic"),
    "ade20k": ("semantic",),
    "yolo_seg": ("instance", "semantic"),
    "object_masks": ("instance", "semantic"),
    "instance_maps": ("instance", "semantic"),
    "volumes": ("semantic",),
    "scenes": ("panoptic", "instance", "semantic"),
    "hub": ("panoptic", "instance", "semantic"),
}
# Formats of folders in the order in which they are chosen where several fit.
RICHEST_FIRST = (
    "cityscapes",
    "coco_panoptic",
    "coco_instance",
    "object_masks",
    "instance_maps",
    "yolo_seg",
    "ade20k",
    "semantic_maps",
    "volumes",
)
FOLDER_SHAPES = """\
  semantic_maps: SPLIT/images/* and SPLIT/labels/*.png [and id2label.json beside the splits]
  coco_instance: SPLIT/images/* and SPLIT/instances.json
  coco_panoptic: SPLIT/images/*, SPLIT/panoptic.json and SPLIT/panoptic/*.png
  standard COCO: [annotations/]panoptic_SPLIT.json and panoptic_SPLIT/*.png, or [annotations/]instances_SPLIT.json,
                 with images in SPLIT/, images/SPLIT/ or input_images/
  cityscapes:    leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/SPLIT/CITY/*_gtFine_{instanceIds,labelIds,
                 labelTrainIds}.png, or gtFine/cityscapes_panoptic_SPLIT.json and cityscapes_panoptic_SPLIT/*.png
  ade20k:        images/{training,validation}/*.jpg and annotations/{training,validation}/*.png [and
                 objectInfo150.txt], or ade20k_panoptic_{train,val}.json with the folder of PNG files of that name, or
                 ade20k_instance_{train,val}.json
  yolo_seg:      SPLIT/images/* and SPLIT/labels/*.txt [and data.yaml beside the splits]
  object_masks:  SPLIT/images/NAME.* and SPLIT/masks/NAME/[CLASS/]*.png,
                 or SPLIT/NAME/images/*.png and SPLIT/NAME/masks/[CLASS/]*.png (also .bmp, .tif)
  instance_maps: SPLIT/images/* and SPLIT/instance_maps/*.png of the same name, their pixels are ids of objects,
                 or SPLIT/NAME[_img].* and SPLIT/NAME_masks.png or NAME_cp_masks.png (also .bmp, .tif);
                 with format='instance_maps' also SPLIT/images/* and SPLIT/labels/*.png or SPLIT/masks/*.png
  volumes:       SPLIT/images/*.nii.gz and SPLIT/labels/*.nii.gz (can be inspected, not trained on)
  parquet or arrow files, or a dataset written by save_to_disk: read by the library `datasets`
SPLIT/images with SPLIT/labels, SPLIT/masks or SPLIT/instance_maps may also be images/SPLIT with labels/SPLIT,
masks/SPLIT or instance_maps/SPLIT;
split=None takes a folder that is itself one split"""


@dataclass(frozen=True)
class Layout:
    """Where the parts of one split lie, in one format.

    Attributes:
        format: a key of `FORMAT_TASKS`.
        folder: what holds the parts: the folder of the split, or the root of the dataset.
        images: folder of the images; of object_masks also a folder that holds one folder for each image.
        annotations: the JSON file, or the data.yaml of yolo_seg.
        maps: folder of the label PNGs, text files or masks; None where there is none, or where they lie among the
            images.
        tasks: the tasks that its files serve, where those are fewer than the format's.
    """

    format: str
    folder: Path
    images: Path
    annotations: Path | None = None
    maps: Path | None = None
    tasks: tuple[str, ...] | None = None

    def served_tasks(self) -> tuple[str, ...]:
        return self.tasks or FORMAT_TASKS[self.format]
