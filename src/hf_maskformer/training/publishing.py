"""`push_to_hub` of a run: the repository is opened before the first step, the finished run is sent after the last one.

The published repository is that of `hf-maskformer push RUN REPO_ID`, because the same function makes it.
"""

import logging
import shlex
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from hf_maskformer.hub.publish import push_run
from hf_maskformer.hub.repository import open_repository
from hf_maskformer.training.config import TrainConfig

logger = logging.getLogger(__name__)


class NotPublished(ValueError):
    """The run is finished and lies whole in its folder, but the Hub did not take it.

    `summary` is what `train` returns otherwise.
    """

    def __init__(self, message: str, summary: dict[str, Any]) -> None:
        super().__init__(message)
        self.summary = summary


def check_publishing(config: TrainConfig, accelerator: Accelerator) -> None:
    """Make sure, before a run spends its budget, that its end can be published; creates the repository.

    Raises:
        ValueError: `open_repository` refused; on every process.
    """
    if config.push_to_hub is None:
        return
    cause = None
    if accelerator.is_main_process:
        try:
            open_repository(config.push_to_hub, private=config.hub_private)
        except ValueError as error:
            cause = error
    message = None if cause is None else f"push_to_hub: {cause}"
    if accelerator.num_processes > 1:
        message = broadcast_object_list([message])[0]
    if message is not None:
        raise ValueError(message) from cause


def publish_finished(config: TrainConfig, accelerator: Accelerator, summary: dict[str, Any]) -> None:
    """Send the finished run to the Hub, from the main process alone: the others have nothing left to wait for.

    Raises:
        NotPublished: with the command that sends it again.
    """
    if config.push_to_hub is None or not accelerator.is_main_process:
        return
    try:
        address = push_run(config.output_dir, config.push_to_hub, private=config.hub_private)
    except (ValueError, OSError) as error:
        words = ["hf-maskformer", "push", config.output_dir, config.push_to_hub]
        again = shlex.join([*words, "--private"] if config.hub_private else words)
        raise NotPublished(
            f"the run is finished and whole in {config.output_dir}, but it was not published: {error}. "
            f"Once that is solved, send it with: {again}",
            summary,
        ) from error
    logger.info("published: %s", address)
