"""Defaults < recipe < flags, and what is refused."""

import json
from argparse import ArgumentParser

import pytest

from hf_maskformer.training.config import TrainConfig, check_same_run, train_config
from hf_maskformer.training.flags import add_flags, parsed_flags


def parse(*words):
    parser = ArgumentParser()
    add_flags(parser)
    return parsed_flags(parser.parse_args(words))


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_flags_win_over_recipe_and_recipe_over_defaults(tmp_path):
    path = recipe(tmp_path, "batch_size: 3\nlearning_rate: 2e-4\nmax_steps: 7\n")
    config = train_config(path, parse("--batch-size", "5"))
    assert config.batch_size == 5
    assert config.learning_rate == 2e-4  # YAML reads 2e-4 as text
    assert config.max_steps == 7
    assert config.weight_decay == TrainConfig(max_steps=1).weight_decay


def test_a_flag_can_set_a_recipes_value_back_to_the_default(tmp_path):
    default = TrainConfig(max_steps=1).batch_size
    path = recipe(tmp_path, f"batch_size: {default + 1}\nmax_steps: 1\ncolor_jitter: false\n")
    config = train_config(path, parse("--batch-size", str(default), "--color-jitter"))
    assert config.batch_size == default
    assert config.color_jitter is True


def test_flag_types():
    given = parse(
        *("--crop-size", "96", "128", "--scale-range", "0.5", "1.5", "--val-split", "none", "--no-color-jitter"),
        *("--schedule-steps", "0.5", "0.7", "0.9", "--ema-decay", "0.99", "--early-stopping-patience", "2"),
        *("--config-overrides", "num_queries=20", "image_size=[96, 128]", "--max-grad-norm", "none", "--resume"),
    )
    assert given == {
        "schedule_steps": (0.5, 0.7, 0.9),
        "ema_decay": 0.99,
        "early_stopping_patience": 2,
        "crop_size": (96, 128),
        "scale_range": (0.5, 1.5),
        "val_split": None,
        "color_jitter": False,
        "config_overrides": {"num_queries": 20, "image_size": [96, 128]},
        "max_grad_norm": None,
        "resume": True,
    }


def test_dict_options_merge_key_by_key(tmp_path):
    path = recipe(tmp_path, "max_steps: 1\nconfig_overrides: {num_queries: 10, matcher: fixed}\n")
    config = train_config(path, parse("--config-overrides", "num_queries=20"))
    assert config.config_overrides == {"num_queries": 20, "matcher": "fixed"}


def test_unknown_recipe_key_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"recipe\.yaml: unknown option 'lerning_rate'.*'learning_rate'"):
        train_config(recipe(tmp_path, "lerning_rate: 1.0\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size: many", r"batch_size is 'many'; allowed: int or auto$"),
        ("batch_size: 2.5", r"batch_size is 2.5; allowed: int or auto"),
        ("batch_size: true", r"batch_size is True; allowed: int or auto"),
        ("images_per_step: 0\nmax_steps: 1", r"images_per_step is 0; it must be at least 1"),
        ("lora_rank: 0\nmax_steps: 1", r"lora_rank is 0; it must be at least 1"),
        ("lora_rank: 4\nmax_steps: 1", r"lora_rank is 4, but adapters of random weights learn little: give init_from"),
        ("lora_alpha: 4\nmax_steps: 1", r"lora_alpha is 4, but without lora_rank there are no adapters"),
        (
            "lora_rank: 4\ninit_from: x\nfreeze: [backbone]\nmax_steps: 1",
            r"freeze and lora_targets both name backbone",
        ),
        ("schedule: linear", r"schedule is 'linear'; allowed: poly, cosine, step, constant"),
        ("schedule_steps: 0.5", r"schedule_steps is 0.5; allowed: several values of type float"),
        ("max_steps: 1\nschedule_steps: [0.9, 0.5]", r"schedule_steps is \(0.9, 0.5\); they must be rising"),
        ("max_steps: 1\nschedule_steps: [0.5, 1]", r"schedule_steps is \(0.5, 1.0\); .* between 0 and 1"),
        ("max_steps: 1\nschedule_steps: []", r"schedule_steps is \(\); they must be rising"),
        ("max_steps: 1\nema_decay: 1", r"ema_decay is 1.0; it must be between 0 and 1, or none"),
        ("max_steps: 1\nearly_stopping_patience: 0", r"patience is 0; with evaluations=4 it must be at least 1"),
        ("max_steps: 1\nearly_stopping_patience: 3", r"patience is 3; .* at most 2 \(evaluations - 2\)"),
        ("max_steps: 1\nearly_stopping_patience: 1\nval_split: none", r"without val_split nothing is evaluated"),
        ("max_steps: 1\neval_batch_size: 0", r"eval_batch_size is 0; it must be at least 1"),
        ("max_steps: 1\neval_limit: 0", r"eval_limit is 0; it must be at least 1"),
        ("max_steps: 1\nkeep_checkpoints: 0", r"keep_checkpoints is 0; it must be at least 1"),
        (
            "max_steps: 1\nlora_targets: [backbone]",
            r"lora_targets is \('backbone',\), but without lora_rank there",
        ),
        (
            "max_steps: 1\nlora_rank: 2\ninit_from: x\nlora_targets: []",
            r"lora_rank is 2, but lora_targets names no",
        ),
        ("max_steps: 1\nschedule_steps: [0.5]", r"schedule_steps is \(0.5,\), which has no effect on schedule 'poly'"),
        ("max_steps: 1\nlayer_decay: 0.5\nfreeze: [backbone]", r"layer_decay is 0.5, but of the backbone nothing is"),
        (
            "max_steps: 1\nlayer_decay: 0.5\nlora_rank: 2\ninit_from: x\nlora_targets: [query_decoder]",
            r"layer_decay is 0.5, but of the backbone nothing is trained",
        ),
        ("crop_size: 96", r"crop_size is 96; allowed: 2 values of type int or none"),
        ("color_jitter: 1", r"color_jitter is 1; allowed: bool"),
        ("batch_size: 0\nmax_steps: 1", r"batch_size is 0; it must be at least 1"),
        ("learning_rate: -1\nmax_steps: 1", r"learning_rate is -1.0; it must be greater than 0"),
        ("max_steps: 1\nscale_range: [2, 1]", r"scale_range is \(2.0, 1.0\); LOW must not exceed HIGH"),
        ("batch_size: 2", r"no training budget"),
        ("- a", r"holds a list; it must be a mapping"),
    ],
)
def test_bad_values_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        train_config(recipe(tmp_path, text))


def test_missing_recipe_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml does not exist"):
        train_config(tmp_path / "nowhere.yaml")


def test_a_bare_no_in_yaml_is_the_word(tmp_path):
    assert train_config(recipe(tmp_path, "max_steps: 1\nmixed_precision: no\n")).mixed_precision == "no"


def test_resume_starts_from_the_runs_own_configuration(tmp_path):
    stored = TrainConfig(max_steps=10, batch_size=3, crop_size=(32, 64), output_dir=str(tmp_path))
    (tmp_path / "train_config.json").write_text(json.dumps(stored.to_dict()))
    config = train_config(None, parse("--resume", "--output-dir", str(tmp_path), "--max-steps", "20"))
    assert (config.batch_size, config.crop_size, config.max_steps, config.resume) == (3, (32, 64), 20, True)


def test_resume_of_a_folder_without_a_run_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"nothing to resume: .*mistyped.*train_config\.json does not exist"):
        train_config(None, parse("--resume", "--output-dir", str(tmp_path / "mistyped")))
    begins = train_config(None, parse("--resume", "--output-dir", str(tmp_path / "new"), "--max-steps", "3"))
    assert begins.resume  # as a job that is restarted does the first time


def test_the_folder_may_be_the_split():
    config = train_config(None, parse("--train-split", "none", "--val-split", "none", "--max-steps", "3"))
    assert (config.train_split, config.val_split) == (None, None)


def test_resume_with_another_batch_size_is_refused():
    stored = json.loads(json.dumps(TrainConfig(max_steps=1, batch_size=3, crop_size=(32, 64)).to_dict()))
    check_same_run(stored, TrainConfig(max_steps=5, batch_size=3, crop_size=(32, 64)))
    with pytest.raises(ValueError, match="batch_size: 3 then, 4 now"):
        check_same_run(stored, TrainConfig(max_steps=5, batch_size=4, crop_size=(32, 64)))


def test_with_images_per_step_another_number_of_processes_is_the_same_run(tmp_path):
    """Two processes stored 2 accumulation steps; how many one process makes is worked out again."""
    stored = TrainConfig(max_steps=1, batch_size=2, images_per_step=8, gradient_accumulation_steps=2).to_dict()
    (tmp_path / "train_config.json").write_text(json.dumps(stored))
    config = train_config(None, {"resume": True, "output_dir": str(tmp_path)})
    assert (config.images_per_step, config.gradient_accumulation_steps) == (8, 1)
    stored = json.loads(json.dumps(stored))
    options = {"max_steps": 1, "batch_size": 2}
    check_same_run(stored, TrainConfig(**options, images_per_step=8, gradient_accumulation_steps=4))
    with pytest.raises(ValueError, match=r"\(images_per_step: 8 then, 16 now\)"):
        check_same_run(stored, TrainConfig(**options, images_per_step=16, gradient_accumulation_steps=4))
    stored = json.loads(json.dumps(TrainConfig(**options, gradient_accumulation_steps=2).to_dict()))
    with pytest.raises(ValueError, match="gradient_accumulation_steps: 2 then, 4 now"):
        check_same_run(stored, TrainConfig(**options, gradient_accumulation_steps=4))


def test_every_option_has_help():
    parser = ArgumentParser()
    add_flags(parser)
    for action in parser._actions:
        assert action.help


def test_an_automatic_batch_size_is_a_word_and_no_number_yet():
    parser = ArgumentParser()
    add_flags(parser)
    assert "--batch-size INT|auto" in parser.format_help()
    config = TrainConfig(max_steps=1, **parse("--batch-size", "auto"))
    with pytest.raises(RuntimeError, match="still 'auto'"):
        _ = config.images_per_pass
    assert TrainConfig(max_steps=1, **parse("--batch-size", "3")).images_per_pass == 3


def test_parts_are_listed_or_none():
    assert parse("--freeze", "backbone", "class_head") == {"freeze": ("backbone", "class_head")}
    assert parse("--freeze", "none") == {"freeze": None}
