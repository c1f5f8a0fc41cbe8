"""Progress, its end, and when an evaluation is due."""

import pytest

from hf_maskformer.training.budget import Budget, TrainState
from hf_maskformer.training.config import TrainConfig


def budget(**fields):
    return Budget(TrainConfig(**fields), num_images=40, images_per_step=8)


def test_progress_by_each_kind_of_budget():
    state = TrainState(step=5, seconds=30.0)
    assert budget(max_steps=20).progress(state) == 0.25
    assert budget(epochs=4).progress(state) == 0.25
    assert budget(max_minutes=2).progress(state) == 0.25


def test_epochs_end_after_as_many_steps_as_fill_them():
    """49 * (1 / 49) is less than 1."""
    for images, images_per_step, epochs in ((49, 1, 1), (47, 3, 3), (98, 2, 7)):
        plan = Budget(TrainConfig(epochs=epochs), num_images=images, images_per_step=images_per_step)
        steps = -(-images * epochs // images_per_step)
        assert [plan.spent(TrainState(step=step)) for step in (steps - 1, steps)] == [False, True]


def test_the_budget_that_is_used_up_first_counts():
    assert budget(max_steps=20, max_minutes=1).progress(TrainState(step=5, seconds=30.0)) == 0.5


def test_evaluations_are_spread_evenly_and_the_last_one_is_left_for_the_end():
    plan = budget(max_steps=12, evaluations=4)
    state = TrainState()
    due = []
    for state.step in range(13):
        if plan.evaluation_due(state):
            state.evaluations += 1
            due.append(state.step)
    assert due == [3, 6, 9]


def test_evaluations_without_a_better_value_end_the_run():
    plan = budget(max_steps=10, evaluations=5, early_stopping_patience=2)
    spent = [plan.spent(TrainState(step=5, evaluations_since_best=number)) for number in range(4)]
    assert spent == [False, False, True, True]
    assert plan.spent(TrainState(step=10))
    assert not budget(max_steps=10).spent(TrainState(step=5, evaluations_since_best=9))


@pytest.mark.parametrize("seconds", [100.0, 119.0])
def test_evaluations_that_a_long_step_passed_are_not_made_up_twice(seconds):
    plan = budget(max_minutes=2, evaluations=4)
    state = TrainState(seconds=seconds)
    assert plan.evaluation_due(state)
    state.evaluations = 3
    assert not plan.evaluation_due(state)


def test_a_resumed_run_counts_the_places_of_its_new_budget():
    plan = budget(max_steps=16, evaluations=4)
    finished = TrainState(step=4, evaluations=4, evaluated_step=4)  # of 4 steps with 4 evaluations
    plan.resume(finished)
    assert finished.evaluations == 1
    between = TrainState(step=8, evaluations=0, evaluated_step=0)
    plan.resume(between)
    assert (between.evaluations, plan.evaluation_due(between)) == (0, True)
    just_evaluated = TrainState(step=8, evaluations=1, evaluated_step=8)  # as half of 2
    plan.resume(just_evaluated)
    assert (just_evaluated.evaluations, plan.evaluation_due(just_evaluated)) == (2, False)
    just_evaluated.step = 11
    assert not plan.evaluation_due(just_evaluated)
    just_evaluated.step = 12
    assert plan.evaluation_due(just_evaluated)
