"""The model card of a run, written from its JSON: nothing in it is typed by hand, and nothing unknown is claimed.

The sections follow Mitchell et al., Model Cards for Model Reporting, 2019, https://arxiv.org/abs/1810.03993. The cards
of the presets (`hf_maskformer.hub.preset_card`) are put together by the same functions.
"""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_maskformer.hub.run_record import TASK_METRICS, RunRecord, read_run

DECIMALS = 4
PIPELINE_TAG = "image-segmentation"
MAIN_TAG = "hf_maskformer"
LONG_TABLE = 25  # rows that a card shows at once; the reader opens a longer table
SEED_NOTE = "One run with one seed: differences of a few points between such runs are noise."
# Fields of the recipe worth a line of the card; recipe.yaml holds all of them.
RECIPE_FIELDS = (
    "preset",
    "config_overrides",
    "init_from",
    "batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "backbone_learning_rate_multiplier",
    "weight_decay",
    "schedule",
    "warmup_steps",
    "mixed_precision",
    "ema_decay",
    "augmentation",
    "crop_size",
    "seed",
)
USE = """```python
from transformers import pipeline

segment = pipeline("image-segmentation", model="{repo_id}", trust_remote_code=True)
for part in segment("photo.jpg"):
    print(part["label"], part["score"], part["mask"].size)
```

With the package `hf_maskformer` installed and imported, `trust_remote_code` is not needed."""


def model_card(
    run: str | Path,
    repo_id: str,
    *,
    license_id: str | None = None,
    samples: tuple[str, ...] = (),
    curves: str | None = None,
) -> ModelCard:
    """The card of the model in RUN/best.

    Its metadata follow `huggingface_hub.ModelCardData`; the model index holds the metrics of these weights only.

    Args:
        run: folder of a finished training run.
        repo_id: where the model will lie, owner/name.
        license_id: licence of the weights as the Hub names it, such as "apache-2.0"; None: the card says that none
            was given.
        samples: image files of the repository to show, each the truth beside the prediction.
        curves: image file of the repository with the curves of the training.

    Raises:
        ValueError: the run is not complete, see `read_run`.
    """
    return card_of(read_run(run), repo_id, license_id=license_id, samples=samples, curves=curves)


def card_of(
    record: RunRecord,
    repo_id: str,
    *,
    license_id: str | None = None,
    samples: tuple[str, ...] = (),
    curves: str | None = None,
) -> ModelCard:
    """As `model_card`, of a run that was read before."""
    head = f"{record.task.capitalize()} segmentation with a mask-classification model of the MaskFormer family"
    sections = {
        "Use": USE.format(repo_id=repo_id),
        "Model": model_section(record),
        "Training data": data_section(record),
        "Recipe": recipe_section(record, curves),
        "Results": results_section(record, repo_id, samples),
        "Hardware": hardware_section(record),
        "Limits": limits_section(record),
        "Licence": license_section(license_id),
    }
    metadata = card_metadata(record, repo_id, license_id)
    return write_card(metadata, repo_id.split("/")[-1], f"{head}{headline(record)}.", sections)


def write_card(metadata: ModelCardData, title: str, head: str, sections: dict[str, str]) -> ModelCard:
    """A card of these parts; it is parsed again, so that what the library cannot read does not leave this function."""
    body = "\n\n".join(f"## {name}\n\n{text}" for name, text in sections.items())
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n# {title}\n\n{head}\n\n{body}\n")


def headline(record: RunRecord) -> str:
    """The metric that the weights were chosen by, as the end of a sentence; empty where nothing was measured."""
    main = next(iter(TASK_METRICS[record.task].values()))
    if main not in record.results:
        return ""
    where = f"split `{record.options['val_split']}` of `{record.dataset}`"
    images = "" if record.image_limit is None else f" (first {record.image_limit} images)"
    return f": {main} {record.results[main]:.{DECIMALS}f} on {where}{images}"


def card_metadata(record: RunRecord, repo_id: str, license_id: str | None) -> ModelCardData:
    """The block at the head of the card; data and base model only where they have an id on the Hub."""
    results = eval_results(record)
    return ModelCardData(
        library_name="transformers",
        license=license_id,
        pipeline_tag=PIPELINE_TAG,
        tags=[MAIN_TAG, PIPELINE_TAG, f"{record.task}-segmentation"],
        datasets=[record.dataset_id] if record.dataset_id else None,
        base_model=record.base_model_id,
        model_name=repo_id.split("/")[-1],
        eval_results=results or None,
    )


def eval_results(record: RunRecord) -> list[EvalResult]:
    """One entry of the model index for each metric of the weights in `best/`."""
    types = {title: name for name, title in TASK_METRICS[record.task].items()}
    part = "" if record.image_limit is None else f", first {record.image_limit} images"
    return [
        EvalResult(
            task_type=PIPELINE_TAG,
            task_name=f"{record.task.capitalize()} segmentation",
            dataset_type=record.dataset_id or record.dataset,
            dataset_name=record.dataset,
            dataset_split=str(record.options["val_split"]),
            dataset_args=record.evaluation_options or None,
            metric_type=types[title],
            metric_name=f"{title}{part}",
            metric_value=round(value, DECIMALS),
        )
        for title, value in record.results.items()
    ]


def model_section(record: RunRecord) -> str:
    model = record.model
    lines = [
        f"- **Preset:** `{record.options['preset']}`",
        f"- **Parts:** pixel decoder `{model['pixel_decoder']}`, query decoder `{model['query_decoder']}`, "
        f"{model['num_queries']} queries",
        f"- **Parameters:** {record.num_parameters:,}",
        f"- **Images:** {_resized(record)}",
        f"- **Classes:** {len(record.labels)}: " + ", ".join(_class_names(record)),
    ]
    if model.get("transformers_version"):
        lines.append(f"- **Written with:** transformers {model['transformers_version']}")
    return "\n".join(lines)


def _resized(record: RunRecord) -> str:
    """What the image processor does to the size of an image."""
    sides = record.model["image_size"]
    if record.options.get("image_resize") == "shortest_edge":
        return f"resized to a shorter side of {min(sides)} pixels, the longer one at most {max(sides)}"
    return f"fitted into a canvas of {sides[0]} x {sides[1]} pixels (height x width) and padded"


def data_section(record: RunRecord) -> str:
    where = f"[{record.dataset_id}](https://huggingface.co/datasets/{record.dataset_id})"
    name = where if record.dataset_id else f"`{record.dataset}`"
    split = record.options["train_split"]
    text = f"Trained on {name}" if split is None else f"Trained on split `{split}` of {name}"
    options = record.options.get("dataset_options")
    text += f", read with {_pairs(options)}." if options else "."
    if record.dataset_is_a_folder:
        text += " The data lay in a folder of this name and is not part of this repository."
    return text


def recipe_section(record: RunRecord, curves: str | None) -> str:
    rows = [
        f"| {name} | {_cell(record.options[name])} |"
        for name in RECIPE_FIELDS
        if record.options.get(name) not in (None, {})
    ]
    minutes = record.metrics.get("training_minutes")
    spent = f" in {minutes:.1f} minutes" if isinstance(minutes, (int, float)) else ""
    data = " --dataset FOLDER" if record.dataset_is_a_folder else ""
    lines = [
        f"{record.metrics.get('steps')} optimizer steps{spent}; the weights are those of step "
        f"{record.metrics.get('best_step') or record.metrics.get('steps')}. "
        "[recipe.yaml](recipe.yaml) holds every option:",
        f"```bash\nhf-maskformer train --recipe recipe.yaml{data} --output-dir runs/{record.task}\n```",
        "\n".join(["| option | value |", "| --- | --- |", *rows]),
    ]
    if curves is not None:
        lines.append(f"![losses, learning rate and metrics over the steps of the training]({curves})")
    return "\n\n".join(lines)


def results_section(record: RunRecord, repo_id: str, samples: tuple[str, ...]) -> str:
    if not record.results:
        return "Not measured: the run has no evaluation of these weights."
    images = "all images" if record.image_limit is None else f"the first {record.image_limit} images"
    rows = [f"| {title} | {value:.{DECIMALS}f} |" for title, value in record.results.items()]
    split = record.options["val_split"]
    blocks = [
        f"On {images} of split `{split}`, at their original size; the weights were chosen by the first of these "
        f"metrics on this split, so another split can score lower. {SEED_NOTE}",
        "\n".join(["| metric | value |", "| --- | --- |", *rows]),
        f"Measured by:\n\n```bash\n{record.evaluation_command(repo_id)}\n```",
    ]
    if record.class_results:
        blocks.append(class_table(record))
    if samples:
        blocks.append("Images of that split, the annotation and what the model makes of them:")
    blocks += [f"![image, truth and prediction]({path})" for path in samples]
    return "\n\n".join(blocks)


def class_table(record: RunRecord) -> str:
    """The main metric of every class; folded away where there are many."""
    main = {"semantic": "IoU", "instance": "mask AP", "panoptic": "PQ"}[record.task]
    values = ["absent" if value is None else f"{value:.{DECIMALS}f}" for value in record.class_results]
    rows = [f"| {name} | {value} |" for name, value in zip(_class_names(record), values, strict=True)]
    table = "\n".join([f"| class | {main} |", "| --- | --- |", *rows])
    title = f"{main} of each class"
    if len(rows) > LONG_TABLE:
        return f"<details>\n<summary>{title}</summary>\n\n{table}\n\n</details>"
    return f"{title}:\n\n{table}"


def hardware_section(record: RunRecord) -> str:
    metrics = record.metrics
    if not metrics.get("hardware"):
        return "The run did not record its hardware."
    text = f"Trained on {_plain(metrics['hardware'])}"
    if metrics.get("images_per_second") is not None:
        text += f", {metrics['images_per_second']:.1f} images a second"
    if metrics.get("peak_memory_mib") is not None:
        where = "of the GPU" if metrics.get("peak_memory_of") == "cuda" else "of the main process"
        text += f", with a peak memory {where} of {metrics['peak_memory_mib'] / 1024:.2f} GiB"
    return f"{text}."


def limits_section(record: RunRecord) -> str:
    model = record.model
    lines = [
        f"- Images are {_resized(record)}; detail that is lost there is not found.",
        f"- At most {model['num_queries']} segments can be found in an image.",
        "- It knows only the classes above, and has seen only the conditions of its training data. Its errors on "
        "other places, people, sensors or seasons are unknown: measure on your own data before you rely on it.",
    ]
    weak = [
        name
        for name, value in zip(_class_names(record), record.class_results, strict=False)
        if value is not None and value < 0.1
    ]
    if weak:
        lines.insert(2, f"- Hardly found at all (below 0.1 on the evaluation split): {', '.join(weak)}.")
    return "\n".join(lines)


def license_section(license_id: str | None) -> str:
    code = "The code in this repository is part of hf_maskformer, Apache-2.0."
    if license_id is not None:
        return f"Weights: {license_id}. {code}"
    return f"No licence was given for the weights; the training data can set terms of their own. {code}"


def _class_names(record: RunRecord) -> list[str]:
    return [_plain(name) + (" (thing)" if label in record.things else "") for label, name in record.labels.items()]


def _cell(value: object) -> str:
    return _pairs(value) if isinstance(value, dict) else _plain(value)


def _pairs(options: dict[str, object]) -> str:
    return ", ".join(f"`{_plain(name)}={_plain(value)}`" for name, value in options.items())


def _plain(value: object) -> str:
    """Text that stays on its line and in its cell."""
    return " ".join(str(value).replace("|", "\\|").split())
