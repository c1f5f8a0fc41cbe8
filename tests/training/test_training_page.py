"""docs/training.md: its commands are understood by the real parser, its examples run, and what it names is there."""

import dataclasses
import re
import shlex

import pytest
from accelerate.commands.launch import launch_command_parser

from hf_maskformer.cli.main import build_parser
from hf_maskformer.training.config import TrainConfig, train_config
from hf_maskformer.training.flags import parsed_flags
from hf_maskformer.training.summary import PARTS
from hf_maskformer.training.train import train

LAUNCH, MODULE = "accelerate launch ", "hf_maskformer.cli.main"


@pytest.fixture
def page(project_root):
    return (project_root / "docs" / "training.md").read_text()


def commands(page):
    """The words of each `hf-maskformer` command of the page, started alone or by `accelerate launch`."""
    blocks = re.findall(r"```(\w*)\n(.*?)```", page, re.DOTALL)
    for line in "".join(text for language, text in blocks if not language).splitlines():
        words = shlex.split(line)
        if line.startswith("hf-maskformer "):
            yield words[1:]
        elif line.startswith(LAUNCH):
            launched = launch_command_parser().parse_args(words[2:])
            assert launched.module
            assert launched.training_script == MODULE
            yield launched.training_script_args
        else:
            assert line.startswith("tensorboard "), line


def test_the_commands_parse(page, project_root, monkeypatch):
    monkeypatch.chdir(project_root)
    found = list(commands(page))
    assert {words[0] for words in found} == {"train", "push", "replay"}
    assert len(found) >= 15
    for words in found:
        arguments = build_parser().parse_args(words)
        if words[0] == "train" and "--resume" not in words:
            config = train_config(arguments.recipe, parsed_flags(arguments))
            assert config.output_dir.startswith("runs/")


def test_flags_in_the_text_exist(page):
    options = {"--" + entry.name.replace("_", "-") for entry in dataclasses.fields(TrainConfig)}
    others = {"--recipe", "--help", "--device", "--private", "--num_processes", "--module", "--logdir"}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page))
    assert len(named) > 25
    assert named - options - others == set()


def test_what_a_run_leaves_is_in_the_table(page):
    for name in (*PARTS, "checkpoints", "failures", "train_config.json"):
        assert re.search(rf"^\| `{re.escape(name)}[/`]", page, re.MULTILINE), name


def test_the_examples_run(page, tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = tiny_run(max_steps=2)
    train(dataclasses.replace(config, output_dir="runs/mine"))
    assert {path.name for path in (tmp_path / "runs" / "mine").iterdir()} <= {
        *PARTS,
        "checkpoints",
        "train_config.json",
    }
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    exec(compile(blocks[0], "docs/training.md", "exec"), {})
    assert "(2, " in capsys.readouterr().out
    trainer = blocks[1]
    for text, changed in (
        ("max_steps=2", "max_steps=1, use_cpu=True, report_to='none', per_device_train_batch_size=1"),
        ("length=8", "length=2, image_size=64"),
        ("length=2)\n", "length=2, image_size=64)\n"),
    ):
        assert trainer.count(text) == 1, text
        trainer = trainer.replace(text, changed)
    exec(compile(trainer, "docs/training.md", "exec"), {})
