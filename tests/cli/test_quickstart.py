"""The quickstart trains what recipes/scenes.yaml says, and leaves a model that the stock pipeline reads."""

import json

import pytest

from hf_maskformer.cli.main import main
from hf_maskformer.cli.quickstart import DEFAULT_MINUTES, MARKER, check_quality, clear, training_config
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


def stored_run(folder, dataset="scenes", preset="maskformer-light-anchored", marked=True):
    """A folder as a finished run leaves it."""
    for name in ("checkpoints/step-00000001", "best", "final"):
        (folder / name).mkdir(parents=True)
    (folder / "train_config.json").write_text(json.dumps({"dataset": dataset, "preset": preset}))
    if marked:
        (folder / MARKER).touch()


def test_it_replaces_its_own_run(tmp_path):
    clear(tmp_path / "new")
    stored_run(tmp_path / "new", marked=False)
    clear(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [MARKER]


@pytest.mark.parametrize(
    "other", [{"marked": False}, {"dataset": "camvid"}, {"preset": "maskformer-swin-tiny"}, {"config": None}]
)
def test_it_deletes_no_other_run(tmp_path, capsys, other):
    folder = tmp_path / "precious"
    stored_run(folder, **{name: value for name, value in other.items() if name != "config"})
    if "config" in other:
        (folder / "train_config.json").unlink()
    before = sorted(folder.rglob("*"))
    assert main(["quickstart", "--output-dir", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "precious holds a run that is not a quickstart's" in error
    assert sorted(folder.rglob("*")) == before


def test_a_full_run_that_learned_nothing_fails():
    check_quality(0.5, DEFAULT_MINUTES)
    check_quality(0.1, DEFAULT_MINUTES / 2)
    for quality in (0.49, float("nan")):
        with pytest.raises(SystemExit, match=r"PQ .* is below the 0\.50"):
            check_quality(quality, DEFAULT_MINUTES)


@pytest.mark.slow
def test_it_writes_model_metrics_and_picture(tmp_path, capsys):
    assert main(["quickstart", "--minutes", "2", "--output-dir", str(tmp_path)]) == 0
    assert "mIoU" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {"pq", "mean_iou", "map"} <= set(metrics)
    assert metrics["segments_drawn"] > 0
    assert (tmp_path / "overlay.png").stat().st_size > 10_000
    assert (tmp_path / "final" / "model.safetensors").is_file()
