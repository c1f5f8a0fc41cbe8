"""What a training run can be told, once: the dataclass is the source of the defaults, of the flags and of their help.

Precedence: the defaults here < a recipe (YAML, only what differs) < flags.
"""

import dataclasses
import difflib
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from hf_maskformer.training.option_values import convert, describe

CONFIG_FILE = "train_config.json"
BUDGETS = ("epochs", "max_steps", "max_minutes")
# A resumed run must be the same run; budgets, reporting and loading details may change.
FIELDS_FIXED_BY_RESUME = (
    "preset",
    "config_overrides",
    "init_from",
    "freeze",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "dataset",
    "format",
    "task",
    "train_split",
    "dataset_options",
    "batch_size",
    "gradient_accumulation_steps",
    "images_per_step",
    "learning_rate",
    "backbone_learning_rate_multiplier",
    "layer_decay",
    "weight_decay",
    "schedule",
    "schedule_steps",
    "bipartite_after",
    "warmup_steps",
    "max_grad_norm",
    "mixed_precision",
    "ema_decay",
    "gradient_checkpointing",
    "augmentation",
    "crop_size",
    "scale_range",
    "flip_probability",
    "color_jitter",
    "max_class_fraction",
    "vertical_flip_probability",
    "copy_paste_probability",
    "intensity_range",
    "seed",
    # The weights of RUN/best are the best on one set of images.
    "val_split",
    "val_dataset_options",
    "eval_limit",
    "image_resize",
)


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """One training run. It needs `epochs`, `max_steps` or `max_minutes`; the first one reached ends it."""

    dataset: str = option("scenes", "dataset folder, Hub id, or 'scenes' for the built-in drawn scenes")
    output_dir: str = option("runs/train", "where best/, final/, metrics.json, log.jsonl, checkpoints/, samples/ go")
    preset: str = option("maskformer-light", "architecture; `hf-maskformer presets` lists them")
    init_from: str | None = option(
        None,
        "start from weights and architecture of this checkpoint (ours or an official maskformer one), not from the "
        "preset; classes of the same name keep their weights",
    )
    freeze: tuple[str, ...] | None = option(
        None, "parts that are not trained, such as backbone; their batch norms keep their statistics"
    )
    lora_rank: int | None = option(
        None, "train low-rank adapters of this rank and the heads only; best/ and final/ hold the merged weights"
    )
    lora_alpha: int | None = option(None, "adapters are scaled by lora_alpha / lora_rank; default: lora_rank")
    lora_targets: tuple[str, ...] = option(
        ("backbone", "pixel_decoder", "query_decoder"), "parts whose linear layers and convolutions get adapters"
    )
    task: Literal["semantic", "instance", "panoptic"] | None = option(None, "default: what the dataset's shape says")
    format: str | None = option(None, "dataset format; default: found from the folder's shape")
    train_split: str | None = option(
        "train", "split to train on; 'none' where the folder is itself the one split, with val_split 'none'"
    )
    val_split: str | None = option("val", "split to evaluate on; 'none' trains without evaluation")
    dataset_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "further KEY=VALUE options to read the dataset; see val_dataset_options for the val split"},
    )
    val_dataset_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "KEY=VALUE options to read the val split with; those not given are taken from dataset_options, "
            "all but length, seed, image_size, streaming and shuffle_buffer"
        },
    )
    config_overrides: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "KEY=VALUE fields of the preset to change"}
    )

    epochs: float | None = option(None, "budget: passes over the training split")
    max_steps: int | None = option(None, "budget: optimizer steps")
    max_minutes: float | None = option(None, "budget: minutes of training, evaluations and checkpoints not counted")

    batch_size: int | Literal["auto"] = option(
        8, "images per process and forward pass; auto: the most that fit into the memory, found by trying"
    )
    gradient_accumulation_steps: int = option(1, "forward passes per optimizer step")
    images_per_step: int | None = option(
        None, "images per optimizer step over all processes; sets gradient_accumulation_steps"
    )
    learning_rate: float = option(1e-4, "of AdamW, for everything but the backbone")
    backbone_learning_rate_multiplier: float = option(0.1, "backbone learning rate / learning_rate")
    layer_decay: float | None = option(
        None, "learning rate of each block of the backbone / that of the block after it, such as 0.9"
    )
    weight_decay: float = option(1e-4, "not applied to norms, biases, embeddings and position tables")
    schedule: Literal["poly", "cosine", "step", "constant"] = option(
        "poly", "learning rate over the budget; poly: power 0.9; step: see schedule_steps"
    )
    schedule_steps: tuple[float, ...] = option(
        (0.9, 0.95), "parts of the budget at which the schedule 'step' divides the learning rate by 10"
    )
    bipartite_after: float | None = option(
        None, "part of the budget after which matcher 'fixed' becomes 'hungarian', such as 0.5; 'none': never"
    )
    warmup_steps: int = option(0, "steps of linear warm-up")
    max_grad_norm: float | None = option(
        0.01, "clip the gradient of the whole model to this norm; 'none': no clipping"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "autocast type of the forward pass")
    gradient_checkpointing: bool = option(
        False,
        "compute activations again in the backward pass: less memory, more time; batch norms that are not frozen "
        "then count each image twice in their statistics",
    )
    compile: bool = option(
        False, "torch.compile of backbone, pixel decoder and query decoder: faster steps after a slow first one"
    )
    fsdp: bool = option(
        False,
        "divide weights, gradients and optimizer state among the processes (torch's fully_shard): less memory on "
        "each; needs more than one, see `accelerate launch`",
    )
    ema_decay: float | None = option(
        None, "average the weights over the steps with this decay, such as 0.999; best/ and final/ hold the average"
    )
    seed: int = option(0, "of weights, data order, augmentation and dropout")
    on_nonfinite: Literal["raise", "skip"] = option(
        "raise",
        "a step whose loss or gradient is not finite ends the run, or is left out (10 in a row end it); "
        "either way it is written to failures/ for `hf-maskformer replay`",
    )

    augmentation: str | None = option(
        None, "published augmentation by name, such as mask2former-coco; the options below override its parts"
    )
    crop_size: tuple[int, int] | None = option(
        None, "HEIGHT WIDTH of a training crop; default: the augmentation's, else the preset's canvas"
    )
    image_resize: Literal["canvas", "shortest_edge"] = option(
        "canvas",
        "how the finished model sees an image, by `image_size` in config_overrides: 'canvas': inside it, padded to "
        "exactly that; 'shortest_edge': enlarged or made smaller until its shorter side is the smaller number, or "
        "its longer side the larger one. Training crops are cut before",
    )
    scale_range: tuple[float, float] | None = option(
        None, "LOW HIGH of the random resize before the crop; default: the augmentation's, else 0.5 2.0"
    )
    flip_probability: float | None = option(None, "of a left-right flip; default: the augmentation's, else 0.5")
    vertical_flip_probability: float | None = option(
        None, "of an upside-down flip; default: the augmentation's, else 0"
    )
    color_jitter: bool | None = option(
        None, "random brightness, contrast, saturation and hue; default: the augmentation's, else on"
    )
    max_class_fraction: float | None = option(None, "try again while one class fills more than this part of a crop")
    copy_paste_probability: float | None = option(
        None, "of pasting objects of another image (not for semantic); default: the augmentation's, else 0"
    )
    num_workers: int = option(1, "processes that read and augment images; 0: in the training process")
    on_bad_sample: Literal["raise", "skip"] = option(
        "raise", "an unreadable image ends the run, or is logged and passed"
    )
    intensity_range: tuple[float, float] | None = option(
        None, "LOW HIGH scaled to 0..255, for 16-bit and float images"
    )

    log_every: int = option(10, "steps per line of log.jsonl")
    tracker: str | None = option(
        "tensorboard", "tensorboard (below output_dir), wandb, ... beside log.jsonl; 'none': log.jsonl alone"
    )
    evaluations: int = option(4, "evaluations on val_split, evenly spread over the budget, the last one at its end")
    eval_limit: int | None = option(None, "images used by every evaluation but the last; best/ is chosen on them")
    eval_batch_size: int = option(4, "images per forward pass in evaluation")
    early_stopping_patience: int | None = option(
        None, "evaluations without a better main metric that end the run; 'none': the budget ends it"
    )
    num_samples: int = option(4, "evaluation images drawn with truth and prediction in samples/")
    checkpoint_every: int = option(200, "steps between checkpoints")
    keep_checkpoints: int = option(2, "newest checkpoints kept")
    resume: bool = option(False, "go on from the newest whole checkpoint of output_dir")
    push_to_hub: str | None = option(
        None,
        "REPO_ID (OWNER/NAME) on the Hugging Face Hub to publish the finished run to, as `hf-maskformer push` does; "
        "opened before the first step, so that a missing login or right shows then",
    )
    hub_private: bool = option(False, "where push_to_hub creates the repository: for its owner only")

    def __post_init__(self) -> None:
        if all(getattr(self, name) is None for name in BUDGETS):
            raise ValueError("no training budget: give at least one of epochs, max_steps, max_minutes")
        for name in ("epochs", "max_steps", "max_minutes", "max_grad_norm", "learning_rate", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value!r}; it must be greater than 0")
        counts = ("gradient_accumulation_steps", "images_per_step", "lora_rank")
        evaluation = ("evaluations", "eval_limit", "eval_batch_size")
        for name in ("batch_size", *counts, "log_every", *evaluation, "checkpoint_every", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and (name, value) != ("batch_size", "auto") and not value >= 1:
                raise ValueError(f"{name} is {value!r}; it must be at least 1")
        for name in (
            "weight_decay",
            "backbone_learning_rate_multiplier",
            "warmup_steps",
            "num_workers",
            "num_samples",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 0")
        for name in ("scale_range", "intensity_range"):
            pair = getattr(self, name)
            if pair is not None and not pair[0] <= pair[1]:
                raise ValueError(f"{name} is {pair!r}; LOW must not exceed HIGH")
        if self.hub_private and self.push_to_hub is None:
            raise ValueError("hub_private is set, but without push_to_hub nothing is published")
        self.check_rates()
        self.check_early_stopping()
        self.check_adapters()
        self.check_backbone()

    @property
    def images_per_pass(self) -> int:
        """`batch_size` where it is a number; RuntimeError while the search of "auto" has not been run."""
        if self.batch_size == "auto":
            raise RuntimeError("batch_size is still 'auto': training.batch_size.found_batch_size finds the number")
        return self.batch_size

    def check_adapters(self) -> None:
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_targets"):
                if getattr(self, name) != getattr(TrainConfig, name):
                    raise ValueError(f"{name} is {getattr(self, name)}, but without lora_rank there are no adapters")
            return
        if not self.lora_targets:
            raise ValueError(f"lora_rank is {self.lora_rank}, but lora_targets names no part for the adapters")
        if self.init_from is None:
            raise ValueError(
                f"lora_rank is {self.lora_rank}, but adapters of random weights learn little: give init_from"
            )
        both = sorted(set(self.freeze or ()) & set(self.lora_targets))
        if both:
            raise ValueError(f"freeze and lora_targets both name {both[0]}; a frozen part gets no adapters")

    def check_backbone(self) -> None:
        adapted = self.lora_rank is None or "backbone" in self.lora_targets
        if self.layer_decay is not None and ("backbone" in (self.freeze or ()) or not adapted):
            raise ValueError(f"layer_decay is {self.layer_decay}, but of the backbone nothing is trained")

    def check_rates(self) -> None:
        steps = self.schedule_steps
        if not steps or list(steps) != sorted(set(steps)) or not 0.0 < steps[0] <= steps[-1] < 1.0:
            raise ValueError(f"schedule_steps is {steps!r}; they must be rising numbers between 0 and 1")
        if self.schedule != "step" and steps != TrainConfig.schedule_steps:
            raise ValueError(f"schedule_steps is {steps!r}, which has no effect on schedule {self.schedule!r}")
        for name in ("ema_decay", "layer_decay", "bipartite_after"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < 1.0:
                raise ValueError(f"{name} is {value!r}; it must be between 0 and 1, or none")

    def check_early_stopping(self) -> None:
        patience = self.early_stopping_patience
        if patience is None:
            return
        if self.val_split is None:
            raise ValueError(f"early_stopping_patience is {patience}, but without val_split nothing is evaluated")
        # The first evaluation is always the best so far, and after the last one there is nothing left to stop.
        if not 1 <= patience <= self.evaluations - 2:
            raise ValueError(
                f"early_stopping_patience is {patience}; with evaluations={self.evaluations} it must be at least 1 "
                f"and at most {self.evaluations - 2} (evaluations - 2) to have an effect"
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def train_config(recipe: str | Path | None = None, flags: dict[str, Any] | None = None) -> TrainConfig:
    """Defaults < recipe < flags. Dict fields (`config_overrides`, ...) merge key by key.

    With `resume` the run's own stored configuration stands below the recipe, so `--resume --output-dir RUN` suffices.

    Raises:
        ValueError: an unknown key (with the nearest field), or a value that is not of the field's type.
    """
    layers = [read_recipe(Path(recipe))] if recipe is not None else []
    layers.append(dict(flags or {}))
    wanted = merge(layers)
    stored = Path(wanted.get("output_dir", TrainConfig.output_dir)) / CONFIG_FILE
    if wanted.get("resume") and stored.is_file():
        values = checked_fields(json.loads(stored.read_text()), str(stored))
        if values.get("images_per_step") is not None:
            values.pop("gradient_accumulation_steps", None)  # follow from it and from the processes that there are now
        layers.insert(0, values)
    merged = merge(layers)
    if wanted.get("resume") and not stored.is_file() and all(merged.get(name) is None for name in BUDGETS):
        raise ValueError(f"nothing to resume: {stored} does not exist, and no budget is given to begin a run with")
    return TrainConfig(**merged)


def merge(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Later layers win; dict values are merged one level deep."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


def read_recipe(path: Path) -> dict[str, Any]:
    """The fields a YAML recipe sets, converted to the dataclass's types."""
    if not path.is_file():
        raise ValueError(f"recipe {path} does not exist")
    values = yaml.safe_load(path.read_text())
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path} holds a {type(values).__name__}; it must be a mapping of training options")
    return checked_fields(values, str(path))


def checked_fields(values: dict[str, Any], where: str) -> dict[str, Any]:
    types_by_name = field_types()
    converted = {}
    for key, value in values.items():
        if key not in types_by_name:
            nearest = difflib.get_close_matches(str(key), types_by_name, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where}: unknown option {key!r}; the nearest one is {nearest!r}")
        try:
            converted[key] = convert(value, types_by_name[key])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {key} is {value!r}; allowed: {describe(types_by_name[key])}") from error
    return converted


def field_types() -> dict[str, Any]:
    return typing.get_type_hints(TrainConfig)


def check_same_run(stored: dict[str, Any], config: TrainConfig) -> None:
    """ValueError naming every option in which a resumed run differs from the one that wrote `stored`."""
    current = json.loads(json.dumps(config.to_dict()))
    # The reader processes share streamed data out among them, so another number of them is another order.
    fixed = [*FIELDS_FIXED_BY_RESUME, *(("num_workers",) if config.dataset_options.get("streaming") else ())]
    if config.images_per_step is not None:
        fixed.remove("gradient_accumulation_steps")  # more processes need fewer of them for the same steps
    differing = [
        f"{name}: {stored[name]!r} then, {current[name]!r} now"
        for name in fixed
        if name in stored and stored[name] != current[name]
    ]
    if differing:
        raise ValueError(f"cannot resume {config.output_dir} with other options ({'; '.join(differing)})")
