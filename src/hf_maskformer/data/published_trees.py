"""Splits of the trees in which COCO, Cityscapes and ADE20K are published, found by the names of files and folders."""

from pathlib import Path

from hf_maskformer.data.formats import Layout

ADE20K_SPLITS = {"training": "train", "validation": "val"}  # folder -> name in the JSON files


def coco_splits(root: Path) -> dict[str, list[Layout]]:
    """A tree as cocodataset.org gives it."""
    found: dict[str, list[Layout]] = {}
    for folder in (root / "annotations", root):
        for annotations in sorted(folder.glob("panoptic_*.json")):
            name = annotations.stem.removeprefix("panoptic_")
            maps = [parent / annotations.stem for parent in (folder, root) if (parent / annotations.stem).is_dir()]
            images = _coco_images(root, name)
            if maps and images:
                found.setdefault(name, []).append(Layout("coco_panoptic", root, images, annotations, maps[0]))
        for annotations in sorted(folder.glob("instances_*.json")):
            name = annotations.stem.removeprefix("instances_")
            images = _coco_images(root, name)
            if images:
                found.setdefault(name, []).append(Layout("coco_instance", root, images, annotations))
    return found


def _coco_images(root: Path, name: str) -> Path | None:
    folders = (root / name, root / "images" / name, root / "input_images")
    return next((folder for folder in folders if folder.is_dir()), None)


def cityscapes_splits(root: Path) -> dict[str, list[Layout]]:
    """leftImg8bit/SPLIT/CITY with gtFine/SPLIT/CITY; a split without labels (test) is listed too."""
    found: dict[str, list[Layout]] = {}
    images_root, truth = root / "leftImg8bit", root / "gtFine"
    if not images_root.is_dir():
        return found
    for images in sorted(path for path in images_root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        name = images.name
        has_instances = any((truth / name).glob("*/*_gtFine_instanceIds.png"))
        has_classes = any((truth / name).glob("*/*_gtFine_label*Ids.png"))
        tasks = ("semantic",) if has_classes and not has_instances else None
        found[name] = [Layout("cityscapes", root, images, maps=truth / name, tasks=tasks)]
        for annotations in (truth / f"cityscapes_panoptic_{name}{ending}.json" for ending in ("", "_trainId")):
            if annotations.is_file() and annotations.with_suffix("").is_dir():
                found[name].append(Layout("coco_panoptic", root, images, annotations, annotations.with_suffix("")))
                break  # the two files hold the same segments
    return found


def ade20k_splits(root: Path) -> dict[str, list[Layout]]:
    """images/training with annotations/training, and the JSON files made from the full ADE20K for detection."""
    found: dict[str, list[Layout]] = {}
    for name, short in ADE20K_SPLITS.items():
        images, maps = root / "images" / name, root / "annotations" / name
        if not images.is_dir():
            continue
        layouts = []
        panoptic, instances = root / f"ade20k_panoptic_{short}.json", root / f"ade20k_instance_{short}.json"
        if panoptic.is_file() and panoptic.with_suffix("").is_dir():
            layouts.append(Layout("coco_panoptic", root, images, panoptic, panoptic.with_suffix("")))
        if instances.is_file():
            layouts.append(Layout("coco_instance", root, images, instances))
        if maps.is_dir():
            layouts.append(Layout("ade20k", root, images, maps=maps))
        if layouts:
            found[name] = layouts
    return found
