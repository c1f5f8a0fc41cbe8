"""Reads a whole dataset and lists what is in it and what is wrong with it; `hf-maskformer inspect-dataset` prints it.

Everything that `load` would read is read here, and every image is decoded too, which `load` leaves to the training.
Nothing that is wrong ends the inspection: it is listed, and reading goes on with the next segment, image or split.
"""

import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image as PILImage

from hf_maskformer.data.hub import hub_source, hub_splits
from hf_maskformer.data.inspection_report import DatasetReport, FoundProblem, ImageFacts, SplitCounts, SplitReport
from hf_maskformer.data.layouts import Layout, find_layouts, split_layouts
from hf_maskformer.data.load import FORMAT_OPTIONS, is_for_hub, open_source
from hf_maskformer.data.picture_choice import Picture, PictureChoice
from hf_maskformer.data.problems import DatasetError, Problem, Problems
from hf_maskformer.data.semantic_maps import IMAGE_SUFFIXES
from hf_maskformer.data.volumes import VolumeItem, require_nibabel, volumes_items, volumes_spec
from hf_maskformer.model.image_conversion import WIDE_PIL_MODES, open_image, pil_to_array
from hf_maskformer.model.label_spec import LabelSpec

DENSE_FORMATS = ("semantic_maps", "ade20k", "cityscapes", "coco_panoptic")  # every pixel should have a label


def inspect_dataset(
    root: str | Path,
    split: str | None = None,
    format: str | None = None,
    task: str | None = None,
    **options: Any,
) -> DatasetReport:
    """Reads every split of a dataset in every format that it has.

    Args:
        root: the folder, or the id of a data set on the Hub.
        split: only this one.
        format: only this one.
        task: only formats that have the truth for it.
        **options: options of the readers, as for `load`.

    Raises:
        ValueError: the folder does not exist or has no known format, an option or split is not known.
    """
    if str(root) == "scenes" and format in (None, "scenes") and not Path(root).is_dir():
        raise ValueError(
            "the built-in scenes are drawn when they are asked for, so there is nothing to inspect; give a folder or "
            "the id of a data set on the Hub"
        )
    layouts: list[tuple[str | None, Layout]]
    without: dict[str | None, str] = {}
    if is_for_hub(root, format, options):
        root = Path(root)
        layouts = [(name, Layout("hub", root, root)) for name in hub_splits(root, split, options, task)]
    else:
        root = Path(os.path.abspath(root))  # readers ask for the names of folders above a file
        layouts, without = _all_layouts(root, split, format, task)
    _check_options({layout.format for _, layout in layouts}, options)
    if any(layout.format == "volumes" for _, layout in layouts):
        require_nibabel()
    inspection = _Inspection(root, options, layouts, task)
    for name, message in without.items():
        inspection.note(name, "none", Problem("missing_file", str(root / (name or "")), message))
    splits = [inspection.inspect(name, layout) for name, layout in layouts]
    return DatasetReport(str(root), tuple(splits), tuple(inspection.found), inspection.pictures.chosen())


def _all_layouts(
    root: Path, split: str | None, format: str | None, task: str | None
) -> tuple[list[tuple[str | None, Layout]], dict[str | None, str]]:
    """(split, layout) of everything to inspect, and for each split that has no known format the reason."""
    names: list[str | None] = [split]
    if split is None and root.is_dir():
        names = [*sorted(split_layouts(root))] or [None]
    layouts: list[tuple[str | None, Layout]] = []
    without: dict[str | None, str] = {}
    failure = None
    for name in names:
        try:
            found = find_layouts(root, name, task, format)
        except ValueError as error:
            failure, without[name] = error, str(error).partition(". Allowed shapes")[0]
            continue
        layouts += [(name, layout) for layout in found if task is None or task in layout.served_tasks()]
    if not layouts:
        raise failure or ValueError(f"{root} has no annotation for task {task!r}")
    return layouts, without


def _check_options(formats: set[str], options: Mapping[str, Any]) -> None:
    allowed = sorted({option for format in formats for option in FORMAT_OPTIONS[format]})
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(
            f"option {unknown[0]!r} is not known for format {', '.join(sorted(formats))}, allowed: "
            f"{', '.join(allowed) or 'none'}"
        )


class _ListedProblems(Problems):
    """Lists everything, and remembers what was only a warning and which files cannot be read."""

    def __init__(self) -> None:
        super().__init__("list")
        self.warnings: set[Problem] = set()
        self._unreadable: set[str] = set()
        self._looked_at = 0

    def is_unreadable(self, file: Path) -> bool:
        """Whether that was reported already."""
        new, self._looked_at = self.found[self._looked_at :], len(self.found)
        self._unreadable |= {problem.file for problem in new if problem.kind == "unreadable_file"}
        return str(file) in self._unreadable

    def warning(self, kind: str, file: str | Path, message: str) -> None:
        super().warning(kind, file, message)
        self.warnings.add(self.found[-1])


class _Inspection:
    """What is known across splits and formats: problems, contents of images, classes, pictures to show."""

    def __init__(
        self, root: Path, options: Mapping[str, Any], layouts: list[tuple[str | None, Layout]], task: str | None
    ) -> None:
        self.root = root
        self.task = task
        self.options = options
        self.found: list[FoundProblem] = []
        self._listed: set[Problem] = set()
        self.pictures = PictureChoice()
        self._image_folders = Counter({(name, layout.images) for name, layout in layouts})
        self._splits_of_folder = Counter(folder for _, folder in self._image_folders)
        self._modes: dict[tuple[str | None, Path], str] = {}  # of the images that were decoded
        self._contents: dict[str, tuple[str | None, Path]] = {}  # hash -> the first image that has it
        self._specs: dict[str, tuple[Path, LabelSpec]] = {}  # format -> the first split's classes

    def note(self, split: str | None, format: str, problem: Problem, refused: bool = True) -> None:
        """Keeps a problem; one that was already found is not listed again."""
        if problem not in self._listed:
            self._listed.add(problem)
            self.found.append(FoundProblem(problem, split, format, refused))

    def inspect(self, split: str | None, layout: Layout) -> SplitReport:
        problems = _ListedProblems()
        known = FORMAT_OPTIONS[layout.format]
        options = {name: value for name, value in self.options.items() if name in known}
        read = self._read_volumes if layout.format == "volumes" else self._read_rows
        report = SplitReport(split, layout.format)
        with problems.catch(layout.annotations or layout.folder):
            report = read(split, layout, options, problems)
        for problem in problems.found:
            self.note(split, layout.format, problem, refused=problem not in problems.warnings)
        return report

    def _read_rows(
        self, split: str | None, layout: Layout, options: dict[str, Any], problems: _ListedProblems
    ) -> SplitReport:
        if layout.format == "hub":
            source = hub_source(self.root, split, options, problems, self.task)
        else:
            source = open_source(layout, self.root, options, problems)
        counts, modes = SplitCounts(source.label_spec), Counter[str]()
        self._check_classes(layout, source.label_spec, problems)
        with problems.catch(layout.annotations or layout.folder):
            for row in source.rows():
                file = self._image_file(split, row)
                facts = ImageFacts.from_row(row)
                counts.add(facts)
                if not len(facts.labels) and layout.format in DENSE_FORMATS:
                    problems.warning(
                        "empty_mask", file, f"{file}: its annotation holds no segment, all pixels are void"
                    )
                mode = self._decode(split, file, problems, row["image"]["bytes"])
                if mode is not None:
                    modes[mode] += 1
                    self.pictures.add(Picture(split, layout.format, source.label_spec, file, row), facts)
        for file in self._other_images(layout):
            self._decode(split, file, problems)
        return counts.report(split, layout.format, modes)

    def _read_volumes(
        self, split: str | None, layout: Layout, options: dict[str, Any], problems: Problems
    ) -> SplitReport:
        assert layout.maps is not None
        spec = volumes_spec(layout.maps, self.root, problems, **options)
        counts = SplitCounts(spec)
        for item in volumes_items(layout.images, layout.maps, spec, problems):
            facts = _volume_facts(item)
            counts.add(facts)
            self._compare_content(split, item.image, item.content, problems)
            self.pictures.add(Picture(split, layout.format, spec, item.image, item), facts)
        return counts.report(split, layout.format, Counter())

    def _image_file(self, split: str | None, row: Mapping[str, Any]) -> Path:
        """The image's file; for one that is stored in its row, a name with the split and the image's id."""
        if row["image"]["bytes"] is None:
            return self._under_root(row["image"]["path"])
        return Path(f"{self.root} {split} image {row['image_id']}")

    def _decode(
        self, split: str | None, file: Path, problems: _ListedProblems, content: bytes | None = None
    ) -> str | None:
        """PIL mode of an image that can be decoded; it is read once for each split that uses it.

        `content` is that of the file, where there is none.
        """
        if (split, file) in self._modes:
            return self._modes[split, file] or None
        self._modes[split, file] = ""
        if problems.is_unreadable(file):
            return None
        with problems.catch(file, "unreadable_file"):
            image = open_image(file) if content is None else open_image(io.BytesIO(content), str(file))
            if image.mode in WIDE_PIL_MODES and not np.isfinite(pil_to_array(image, str(file))).all():
                raise DatasetError("unreadable_file", file, f"{file}: holds values that are nan or infinite")
            self._compare_content(split, file, _content(image), problems)
            self._modes[split, file] = image.mode
        return self._modes[split, file] or None

    def _compare_content(self, split: str | None, file: Path, content: str, problems: Problems) -> None:
        first_split, first = self._contents.setdefault(content, (split, file))
        if (first_split, first) == (split, file):
            return
        where = "" if split == first_split else f", which is in split {first_split}: what is measured was trained on"
        same = f"stands in split {split} too" if file == first else f"is the same image as {first}"
        problems.warning("duplicate", file, f"{file} {same}{where}")

    def _check_classes(self, layout: Layout, spec: LabelSpec, problems: Problems) -> None:
        """Every class has a name of its own, and the splits agree on what a label id means."""
        file = layout.annotations or layout.folder
        for raw in _unnamed(spec):
            problems.warning("unknown_label", file, f"{file}: class {raw} has no name")
        for name, count in Counter(spec.id2label.values()).items():
            if count > 1:
                problems.warning("duplicate", file, f"{file}: {count} classes are named {name!r}")
        other, first = self._specs.setdefault(layout.format, (file, spec))
        if first.id2label == spec.id2label and first.thing_label_ids == spec.thing_label_ids:
            return
        label = next(
            (label for label in spec.id2label if first.id2label.get(label) != spec.id2label[label]), spec.num_labels
        )
        names = [repr(labels.id2label.get(label, "no class")) for labels in (spec, first)]
        problems.warning(
            "broken_record",
            file,
            f"{file}: its classes are not those of {other}, label {label} is {names[0]} here and {names[1]} there",
        )

    def _other_images(self, layout: Layout) -> Iterator[Path]:
        """Image files of a folder that serves one split only; those that gave a row were decoded with it."""
        if layout.images == layout.folder or self._splits_of_folder[layout.images] > 1:
            return
        for file in sorted(layout.images.rglob("*")):
            if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file() and not file.name.startswith("."):
                yield self._under_root(file)

    def _under_root(self, path: str | Path) -> Path:
        """The file as the readers name it, from the root that was given."""
        absolute, root = Path(os.path.abspath(path)), os.path.abspath(self.root)
        return self.root / absolute.relative_to(root) if absolute.is_relative_to(root) else absolute


def _content(image: PILImage) -> str:
    """Hash of the pixels, equal for equal pictures whatever file they were read from."""
    pixels = image.convert("RGBA") if image.mode == "P" else image
    return hashlib.blake2b(pixels.tobytes(), key=f"{pixels.mode}{pixels.size}".encode(), digest_size=16).hexdigest()


def _unnamed(spec: LabelSpec) -> list[int]:
    """Classes whose name is empty or only their id, as they are numbered in the files."""
    numbered = spec.raw_to_label or {label: label for label in spec.id2label}
    names = {raw: spec.id2label[label].strip() for raw, label in numbered.items() if label in spec.id2label}
    return [raw for raw, name in names.items() if name in ("", str(raw))]


def _volume_facts(item: VolumeItem) -> ImageFacts:
    return ImageFacts(
        name=str(item.image),
        size=item.size,
        labels=item.labels,
        pixels=item.voxels,
        crowds=np.zeros(len(item.labels), dtype=bool),
        void=item.void_voxels,
        spacing=item.spacing,
    )
