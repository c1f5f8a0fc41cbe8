"""How much of a run is spent: by epochs, steps or minutes, whichever is used up first."""

from dataclasses import asdict, dataclass
from typing import Any

from hf_maskformer.training.config import TrainConfig


@dataclass
class TrainState:
    """Where a run stands; stored in each checkpoint.

    `seconds` counts training steps only; `data_seconds` is the part of it in which they waited for their batches.
    `evaluations` counts the places of evaluations that are done with, see `Budget.passed`; `evaluated_step` is the
    step of the last evaluation, `finished_step` the one at which a run ended.
    """

    step: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    evaluations: int = 0
    best_value: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    evaluated_step: int = 0
    finished_step: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Budget:
    """Progress from 0 to 1 over the budgets a configuration sets; drives schedule, evaluations and the end.

    Args:
        config: its budgets count.
        num_images: of an epoch; None where that is not known, as for streamed data.
        images_per_step: over all processes.

    Raises:
        ValueError: a budget in epochs whose length is not known.
    """

    def __init__(self, config: TrainConfig, *, num_images: int | None, images_per_step: int) -> None:
        check_length(config, known=num_images is not None)
        self.max_steps = config.max_steps
        self.epochs = config.epochs
        self.max_minutes = config.max_minutes
        self.evaluations = config.evaluations
        self.patience = config.early_stopping_patience
        self.num_images = num_images
        self.images_per_step = images_per_step

    def progress(self, state: TrainState) -> float:
        spent = []
        if self.max_steps is not None:
            spent.append(state.step / self.max_steps)
        if self.epochs is not None and self.num_images is not None:
            # Integers as long as possible: 49 / 49, not 49 * (1 / 49), which is less than 1.
            spent.append(state.step * self.images_per_step / (self.num_images * self.epochs))
        if self.max_minutes is not None:
            spent.append(state.seconds / 60.0 / self.max_minutes)
        return max(spent)

    def spent(self, state: TrainState) -> bool:
        """Whether the run is at its end."""
        return self.progress(state) >= 1.0 or self.stopped_early(state)

    def stopped_early(self, state: TrainState) -> bool:
        """Whether the last `early_stopping_patience` evaluations were all no better than one before them."""
        return self.patience is not None and state.evaluations_since_best >= self.patience

    def evaluation_due(self, state: TrainState) -> bool:
        """Whether one of the evaluations before the last is due; the last one follows the loop."""
        return self.passed(state) > state.evaluations

    def passed(self, state: TrainState) -> int:
        """How many of the evaluations before the last have their place in the part of the budget that is spent."""
        return min(int(self.progress(state) * self.evaluations), self.evaluations - 1)

    def resume(self, state: TrainState) -> None:
        """Count the evaluations of a resumed run anew: its budget, and how many it makes, may be others now."""
        passed = self.passed(state)
        state.evaluations = passed if state.evaluated_step == state.step else min(state.evaluations, passed)


def check_length(config: TrainConfig, *, known: bool) -> None:
    """ValueError for a budget in epochs where the number of images in one is not `known`."""
    if not known and config.epochs is not None:
        raise ValueError(
            f"epochs is {config.epochs}, but the length of streamed data is not known: give max_steps or "
            "max_minutes, or load the data without streaming"
        )
