"""The quickstart trains what recipes/scenes.yaml says, and leaves a model that the stock pipeline reads."""

import json

import pytest

from hf_maskformer.cli.main import main
from hf_maskformer.cli.quickstart import training_config
from hf_maskformer.training.config import train_config


def test_its_configuration_is_the_recipe_with_another_budget(project_root, tmp_path):
    quick = training_config(tmp_path, minutes=6.0, seed=0).to_dict()
    recipe = train_config(project_root / "recipes" / "scenes.yaml").to_dict()
    differing = {name for name in quick if quick[name] != recipe[name]}
    assert differing == {"output_dir", "epochs", "max_minutes", "val_split", "val_dataset_options"}


@pytest.mark.parametrize("name", ["scenes.yaml", "camvid.yaml"])
def test_recipes_carry_only_what_differs_from_the_defaults(project_root, name):
    import yaml

    from hf_maskformer.training.config import TrainConfig

    defaults = TrainConfig(max_steps=1).to_dict()
    recipe = train_config(project_root / "recipes" / name).to_dict()
    stated = yaml.safe_load((project_root / "recipes" / name).read_text())
    # Preset and data set say what the recipe is for, so they stand there even when they are the default.
    assert [key for key in stated if recipe[key] == defaults[key] and key not in ("preset", "dataset")] == []


@pytest.mark.slow
def test_it_writes_model_metrics_and_picture(tmp_path, capsys):
    assert main(["quickstart", "--minutes", "0.05", "--output-dir", str(tmp_path)]) == 0
    assert "mIoU" in capsys.readouterr().out
    assert {"pq", "mean_iou", "map"} <= set(json.loads((tmp_path / "metrics.json").read_text()))
    assert (tmp_path / "overlay.png").stat().st_size > 10_000
    assert (tmp_path / "final" / "model.safetensors").is_file()
