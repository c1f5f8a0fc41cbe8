"""The card says what the run's JSON says, no more, and huggingface_hub reads its metadata back."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from hf_maskformer.hub.card import LONG_TABLE, model_card
from hf_maskformer.hub.run_record import OPTIONS_OF_ONE_SPLIT, TASK_METRICS, public_options, read_run
from hf_maskformer.training import run as training_run
from hf_maskformer.training import setup
from hf_maskformer.training.config import train_config
from hub.card_rules import card_problems


def section(card, title):
    return str(card).split(f"## {title}\n\n")[1].split("\n\n## ")[0].strip()


def test_the_metadata_are_exact(make_run):
    card = model_card(make_run(), "me/fields-light", license_id="cc-by-4.0")
    metadata = yaml.safe_load(str(card).split("---\n")[1])
    metrics = [
        {"type": "mean_iou", "value": 0.5123, "name": "mIoU"},
        {"type": "overall_accuracy", "value": 0.75, "name": "pixel accuracy"},
    ]
    result = {
        "task": {"type": "image-segmentation", "name": "Semantic segmentation"},
        "dataset": {"name": "fields", "type": "fields", "split": "val"},
        "metrics": metrics,
    }
    assert metadata == {
        "library_name": "transformers",
        "license": "cc-by-4.0",
        "pipeline_tag": "image-segmentation",
        "tags": ["hf_maskformer", "image-segmentation", "semantic-segmentation"],
        "model-index": [{"name": "fields-light", "results": [result]}],
    }


def test_the_library_reads_the_metadata_back(make_run, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(str(model_card(make_run(), "me/fields-light")))
    card = ModelCard.load(path, ignore_metadata_errors=False)
    assert isinstance(card.data, ModelCardData)
    assert card.data.model_name == "fields-light"
    assert [(result.metric_type, result.metric_value) for result in card.data.eval_results] == [
        ("mean_iou", 0.5123),
        ("overall_accuracy", 0.75),
    ]
    assert card.data.to_dict() == yaml.safe_load(path.read_text().split("---\n")[1])


def test_the_results_of_the_best_weights(make_run):
    card = model_card(make_run(), "me/fields-light", samples=("samples/step-00000040.png",))
    results = section(card, "Results")
    assert "On all images of split `val`" in results
    assert "| mIoU | 0.5123 |\n| pixel accuracy | 0.7500 |\n\n" in results
    assert "| sky | 0.9000 |\n| grass | absent |\n| crate \\| box | 0.0500 |" in results
    assert "hf-maskformer evaluate me/fields-light --dataset fields --split val\n" in results
    assert "](samples/step-00000040.png)" in results
    assert "(below 0.1 on the evaluation split): crate \\| box." in section(card, "Limits")


def test_how_images_are_resized(make_run):
    limits = section(model_card(make_run("a"), "me/x"), "Limits")
    assert re.search(r"Images are fitted into a canvas of \d+ x \d+ pixels \(height x width\) and padded;", limits)
    card = model_card(make_run("b", image_resize="shortest_edge"), "me/x")
    assert re.search(r"Images:\*\* resized to a shorter side of \d+ pixels, the longer one at most \d+", str(card))
    assert "canvas" not in section(card, "Limits")


def test_the_numbers_of_the_last_weights_are_not_given_to_the_best_ones(make_run):
    run = make_run(metrics={"best_step": 20, "best_value": 0.6}, eval_limit=7, dataset_options={"length": 9})
    card = model_card(run, "me/x")
    results = section(card, "Results")
    assert "On the first 7 images" in results
    assert "| mIoU | 0.6000 |\n\nMeasured by:" in results
    assert "--split val --limit 7\n" in results
    assert "0.5123" not in str(card)
    assert "the weights are those of step 20" in section(card, "Recipe")
    assert [result.metric_name for result in card.data.eval_results] == ["mIoU, first 7 images"]


def test_the_first_sentence_says_what_the_model_reaches(make_run):
    kind = "Semantic segmentation with a mask-classification model of the MaskFormer family"
    run = make_run()
    head = str(model_card(run, "me/x")).split("# x\n\n")[1].split("\n")[0]
    assert head == f"{kind}: mIoU 0.5123 on split `val` of `fields`."
    some = make_run("some", metrics={"best_step": 20, "best_value": 0.6}, eval_limit=7)
    assert "mIoU 0.6000 on split `val` of `fields` (first 7 images)." in str(model_card(some, "me/x"))
    assert f"{kind}.\n" in str(model_card(make_run("none", metrics={"mean_iou": None}), "me/x"))


def test_the_curves_are_shown_where_they_are_published(make_run):
    run = make_run()
    assert "](training_curves.png)" in section(model_card(run, "me/x", curves="training_curves.png"), "Recipe")
    assert "curves" not in str(model_card(run, "me/x"))


def test_many_classes_are_folded_away(make_run):
    def card(count):
        labels = {str(label): f"class {label}" for label in range(count)}
        run = make_run(f"run{count}", metrics={"per_category_iou": [0.5] * count})
        path = run / "best" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": labels}))
        return section(model_card(run, "me/x"), "Results")

    assert "IoU of each class:\n\n| class | IoU |" in card(LONG_TABLE)
    assert "<details>\n<summary>IoU of each class</summary>\n\n| class | IoU |" in card(LONG_TABLE + 1)


def test_the_card_of_every_kind_of_run_follows_the_rules_of_the_hub(make_run):
    runs = [
        make_run("local", dataset_options={"ignore_index": 255}),
        make_run("hub", dataset="them/fields", init_from="them/start"),
        make_run("none", metrics={"best_step": None, "best_value": None, "mean_iou": None}, val_split=None),
        make_run("built in", dataset="scenes"),
    ]
    for run in runs:
        assert card_problems(str(model_card(run, "me/x", license_id="cc-by-4.0"))) == []
    assert "--dataset FOLDER" not in str(model_card(runs[1], "me/x")) + str(model_card(runs[3], "me/x"))
    assert card_problems(str(model_card(runs[0], "me/x", license_id="my-own"))) != []


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        ("tags: x", '"tags" must be a list'),
        ("datasets: [a/b/c]", '"datasets" must hold ids'),
        ("pipeline_tag: segmentation", '"pipeline_tag" must be one of'),
        ("model-index: [{name: x}]", "needs a name and a list of results"),
        (
            "model-index: [{name: x, results: [{task: {type: t}, metrics: [{type: m, value: 1}]}]}]",
            r"dataset\.type is",
        ),
        ("model-index: [{name: x, results: [{task: {type: t}, metrics: [{type: m}]}]}]", "a type and a number"),
    ],
)
def test_the_rules_can_fail(head, problem):
    assert re.search(problem, " ".join(card_problems(f"---\n{head}\n---\n")))


def test_a_run_without_evaluation_claims_nothing(make_run):
    nothing = {"best_step": None, "best_value": None, "mean_iou": None, "hardware": None}
    card = model_card(make_run(metrics=nothing, val_split=None), "me/x")
    assert section(card, "Results") == "Not measured: the run has no evaluation of these weights."
    assert section(card, "Hardware") == "The run did not record its hardware."
    assert "model-index" not in str(card)


def test_the_other_sections(make_run):
    card = model_card(make_run(dataset_options={"ignore_index": 255}), "me/fields-light")
    hardware = "Trained on 1 x Test GPU, 12.5 images a second, with a peak memory of the GPU of 2.00 GiB."
    assert section(card, "Hardware") == hardware
    data = section(card, "Training data")
    assert data.startswith(
        "Trained on split `train` of `fields`, read with `ignore_index=255`. The data lay in a folder"
    )
    assert "train --recipe recipe.yaml --dataset FOLDER --output-dir runs/semantic\n" in section(card, "Recipe")
    assert section(card, "Licence").startswith("No licence was given for the weights")
    assert "40 optimizer steps in 1.2 minutes" in section(card, "Recipe")
    assert "| seed | 3 |" in section(card, "Recipe")
    code = section(card, "Use").split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line]) <= 5
    assert 'model="me/fields-light"' in code
    compile(code, "card", "exec")


def test_hub_ids_become_links_and_local_paths_do_not_show(make_run, tmp_path):
    run = make_run(
        dataset="them/fields",
        init_from="them/start",
        val_dataset_options={"cache_dir": str(tmp_path), "label_table": "~/private/table.csv"},
    )
    card = model_card(run, "me/x")
    assert card.data.datasets == ["them/fields"]
    assert card.data.base_model == "them/start"
    assert "huggingface.co/datasets/them/fields" in section(card, "Training data")
    local = model_card(make_run("local", init_from=str(tmp_path / "private" / "start")), "me/x")
    for text in (str(card), str(local), json.dumps(read_run(run).options)):
        assert str(tmp_path) not in text
        assert "private" not in text
    assert "| init_from | start |" in str(local)
    assert local.data.base_model is None


def test_the_published_options_are_a_recipe(make_run, tmp_path):
    changes = {"learning_rate": 3e-5, "crop_size": (32, 48), "dataset_options": {"cache_dir": "x"}}
    options = read_run(make_run(**changes, push_to_hub="me/x", hub_private=True)).options
    assert not {"push_to_hub", "hub_private", "output_dir", "resume"} & set(options)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    config = train_config(path)
    assert (config.dataset, config.learning_rate, config.crop_size, config.seed) == ("fields", 3e-5, (32, 48), 3)
    assert config.dataset_options == {}
    assert public_options(config.to_dict()) == {**options, "crop_size": [32, 48]}


def test_what_is_stated_twice_agrees():
    assert set(setup.OPTIONS_OF_ONE_SPLIT) == OPTIONS_OF_ONE_SPLIT
    assert {task: next(iter(names)) for task, names in TASK_METRICS.items()} == training_run.MAIN_METRIC


@pytest.mark.parametrize("name", ["train_config.json", "metrics.json"])
def test_an_unfinished_or_damaged_run(make_run, name):
    run = make_run()
    (run / name).write_text("{")
    with pytest.raises(ValueError, match=rf"{name} is not JSON"):
        model_card(run, "me/x")
    (run / name).unlink()
    with pytest.raises(ValueError, match=rf"no finished training run: it holds no {name}"):
        model_card(run, "me/x")


def test_weights_that_are_cut_in_half(make_run):
    weights = make_run() / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        read_run(weights.parent.parent)
