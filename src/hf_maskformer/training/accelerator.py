"""Accelerate as a run's options ask for it, and the options that the machine cannot carry out."""

import os
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs

from hf_maskformer.training.budget import check_length
from hf_maskformer.training.compilation import check_compiler
from hf_maskformer.training.config import TrainConfig
from hf_maskformer.training.trackers import tracker_options

LAUNCH_PRECISION = "ACCELERATE_MIXED_PRECISION"  # set by `accelerate launch`, "no" where it is not told one
# The main process alone evaluates, saves and publishes, while the others wait for its next word.
LONGEST_WAIT = timedelta(hours=24)


def open_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate as the options ask for it; the trackers write below the run.

    Raises:
        ValueError: a tracker or a precision that cannot be had here, or one other than that of `accelerate launch`.
    """
    trackers = tracker_options(config.tracker, Path(config.output_dir))
    launched = os.environ.get(LAUNCH_PRECISION, "no").lower()
    if launched not in ("no", config.mixed_precision):
        raise ValueError(
            f"`accelerate launch` asks for mixed precision {launched!r}, mixed_precision is "
            f"{config.mixed_precision!r}: give --mixed-precision to hf-maskformer, not to `accelerate launch`"
        )
    patience = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
    if config.mixed_precision == "fp16" and PartialState(**patience.to_kwargs()).device.type == "cpu":
        raise ValueError("mixed_precision is 'fp16', which has no effect on the CPU; use 'bf16' or 'no'")
    return Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        kwargs_handlers=[patience],
        **trackers,
    )


def check_machine(config: TrainConfig, accelerator: Accelerator, *, sharded: bool) -> None:
    """What can be known of the machine and the data before either is touched.

    Raises:
        ValueError: shards for one process, no working compiler, or a budget in epochs of streamed data.
    """
    if sharded and accelerator.num_processes == 1:
        raise ValueError("fsdp needs more than one process to divide a model among: start it by `accelerate launch`")
    check_length(config, known=not config.dataset_options.get("streaming"))
    if config.compile:
        check_compiler(accelerator.device)
