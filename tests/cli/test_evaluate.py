"""`hf-maskformer evaluate` from end to end: the report of every task, official checkpoints, options said twice."""

import json
import os
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DetrConfig, MaskFormerConfig, MaskFormerForInstanceSegmentation, ResNetConfig
from transformers import MaskFormerImageProcessor as OfficialProcessor

from hf_maskformer.cli.main import main
from hf_maskformer.evaluation.evaluate import evaluate
from hf_maskformer.model.masks import encode_rle, ids_to_panoptic_png
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.presets import image_processor_for, preset

REPORT = {
    *("metrics.json", "table.txt", "per_class.csv", "images.csv"),
    *("confusion_matrix.csv", "confusion_matrix.png", "worst_images.png"),
}
NAMES = ["grass", "cow"]
SIZE = (40, 56)


def objects(index):
    """(H, W) ids: grass 1, cows 2 and 3."""
    ids = np.ones(SIZE, dtype=np.int32)
    ids[5:20, 5 + index : 25] = 2
    ids[22:38, 30 : 50 - index] = 3
    return ids


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same two images as semantic maps, COCO instances and COCO panoptic."""
    root = tmp_path_factory.mktemp("formats")
    panoptic, instances = [], []
    categories = [{"id": 1, "name": "grass", "isthing": 0}, {"id": 2, "name": "cow", "isthing": 1}]
    for folder in ("semantic/val/labels", "panoptic/val/panoptic", "instance/val"):
        (root / folder).mkdir(parents=True)
    for index in range(2):
        ids, name = objects(index), f"{index}.png"
        for format in ("semantic", "panoptic", "instance"):
            (root / format / "val" / "images").mkdir(exist_ok=True)
            Image.fromarray((ids * 70).astype(np.uint8)).convert("RGB").save(root / format / "val" / "images" / name)
        Image.fromarray((ids > 1).astype(np.uint8)).save(root / "semantic" / "val" / "labels" / name)
        Image.fromarray(ids_to_panoptic_png(ids)).save(root / "panoptic" / "val" / "panoptic" / name)
        segments = [{"id": number, "category_id": 1 + (number > 1), "iscrowd": 0} for number in (1, 2, 3)]
        panoptic.append({"image_id": index, "file_name": name, "segments_info": segments})
        for number in (2, 3):
            mask = ids == number
            instances.append(
                {
                    "id": 10 * index + number,
                    "image_id": index,
                    "category_id": 2,
                    "segmentation": encode_rle(mask),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                }
            )
    images = [{"id": index, "file_name": f"{index}.png", "height": SIZE[0], "width": SIZE[1]} for index in range(2)]
    content = {"images": images, "categories": categories}
    (root / "panoptic" / "val" / "panoptic.json").write_text(json.dumps({**content, "annotations": panoptic}))
    (root / "instance" / "val" / "instances.json").write_text(json.dumps({**content, "annotations": instances}))
    (root / "semantic" / "id2label.json").write_text(json.dumps(dict(enumerate(NAMES))))
    return root


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A checkpoint written by transformers' own classes."""
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", out_features=stages
    )
    decoder = DetrConfig(
        d_model=32, decoder_layers=1, decoder_ffn_dim=16, decoder_attention_heads=2, num_queries=5, encoder_layers=1
    )
    config = MaskFormerConfig(
        backbone_config=backbone,
        decoder_config=decoder,
        fpn_feature_size=32,
        mask_feature_size=32,
        id2label={0: "Grass", 1: "cow, cattle"},
        label2id={"Grass": 0, "cow, cattle": 1},
    )
    folder = tmp_path_factory.mktemp("official")
    MaskFormerForInstanceSegmentation(config).save_pretrained(folder)
    OfficialProcessor(size={"shortest_edge": 40, "longest_edge": 64}, ignore_index=255).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    torch.manual_seed(0)
    config = preset(
        "maskformer-light",
        id2label=dict(enumerate(NAMES)),
        thing_label_ids=[1],
        task="panoptic",
        image_size=[64, 64],
        num_queries=6,
        threshold=0.2,
    )
    folder = tmp_path_factory.mktemp("ours")
    HfMaskFormerForUniversalSegmentation(config).save_pretrained(folder)
    image_processor_for(config).save_pretrained(folder)
    return folder


def words_for(model, data, tmp_path, *more, format="panoptic"):
    options = [f"cache_dir={tmp_path / 'cache'}"]
    return [
        str(word) for word in ("evaluate", model, "--dataset", data / format, *more, "--dataset-options", *options)
    ]


def failure(capsys, words):
    assert main(words) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("checkpoint", ["ours", "official"])
@pytest.mark.parametrize(
    ("format", "task", "key"),
    [
        ("panoptic", "panoptic", "pq"),
        ("panoptic", "semantic", "mean_iou"),
        ("panoptic", "instance", "map"),
        ("instance", "instance", "map"),
        ("semantic", "semantic", "mean_iou"),
    ],
)
def test_any_checkpoint_on_any_task(checkpoint, format, task, key, request, folders, tmp_path, capsys):
    model = request.getfixturevalue(checkpoint)
    report, target = tmp_path / "report", tmp_path / "metrics.json"
    more = ["--task", task, "--report-dir", report, "--json", target, "--boundary", "--worst", 1]
    assert main(words_for(model, folders, tmp_path, *more, format=format)) == 0
    assert {path.name for path in report.iterdir()} == REPORT
    metrics = json.loads(target.read_text())
    assert metrics == json.loads((report / "metrics.json").read_text())
    assert key in metrics
    assert any(name.startswith("boundary_") for name in metrics)
    assert all(not isinstance(value, dict) for value in metrics.values())
    table = capsys.readouterr().out
    assert "cow" in table
    assert key in table
    assert len((report / "images.csv").read_text().splitlines()) == 3


def test_the_merge_can_be_chosen(ours, folders, tmp_path, capsys, monkeypatch):
    merges = []

    def recorded(*args, merge, **settings):
        merges.append(merge)
        return evaluate(*args, merge=merge, **settings)

    monkeypatch.setattr("hf_maskformer.evaluation.evaluate.evaluate", recorded)
    assert main(words_for(ours, folders, tmp_path)) == 0
    assert main(words_for(ours, folders, tmp_path, "--merge", "mask_wise")) == 0
    assert merges == [None, "mask_wise"]
    wrong = words_for(ours, folders, tmp_path, "--merge", "argmax", "--task", "semantic")
    assert "the task is 'semantic'" in failure(capsys, wrong)


@pytest.mark.parametrize(("format", "key"), [("panoptic", "pq"), ("instance", "map"), ("semantic", "mean_iou")])
def test_an_official_checkpoint_takes_the_datas_task(format, key, official, folders, tmp_path):
    target = tmp_path / "metrics.json"
    assert main(words_for(official, folders, tmp_path, "--json", target, format=format)) == 0
    assert key in json.loads(target.read_text())


def test_class_names_must_agree_or_be_ignored(official, folders, tmp_path, capsys):
    config = json.loads((official / "config.json").read_text())
    model = tmp_path / "model"
    model.mkdir()
    for file in official.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "config.json").write_text(json.dumps({**config, "id2label": {"0": "grass", "1": "sheep"}}))
    words = words_for(model, folders, tmp_path)
    assert "1 is 'sheep' in the model and 'cow' in the data" in failure(capsys, words)
    assert main([*words[:-2], "--ignore-class-names", *words[-2:]]) == 0
    (model / "config.json").write_text(json.dumps({**config, "id2label": {"0": "cow", "1": "grass"}}))
    assert "in another order" in failure(capsys, words)


def test_limit_and_worst(ours, folders, tmp_path):
    report = tmp_path / "report"
    assert main(words_for(ours, folders, tmp_path, "--limit", 1, "--worst", 0, "--report-dir", report)) == 0
    assert {path.name for path in report.iterdir()} == REPORT - {"worst_images.png"}
    assert len((report / "images.csv").read_text().splitlines()) == 2


def test_options_that_have_a_flag_of_their_own(ours, folders, tmp_path, capsys):
    words = words_for(ours, folders, tmp_path)
    assert main([*words, "on_bad_sample=skip"]) == 0
    capsys.readouterr()
    twice = failure(capsys, ["evaluate", "--on-bad-sample", "raise", *words[1:], "on_bad_sample=skip"])
    assert "on_bad_sample is 'skip' in --dataset-options but --on-bad-sample is 'raise'" in twice
    assert "use --split instead" in failure(capsys, [*words, "split=train"])
    assert "worst must be at least 0" in failure(
        capsys, ["evaluate", "--worst", "-1", "--report-dir", str(tmp_path / "r"), *words[1:]]
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--device", "foo"), "--device 'foo' is not there; devices of this machine: cpu"),
        (("--device", "cuda:99"), "--device 'cuda:99' is not there"),
        (("--limit", "0"), "--limit is 0; it must be at least 1"),
        (("--batch-size", "-2"), "--batch-size is -2; it must be at least 1"),
        (("--json", "FOLDER"), "FOLDER is a folder; it must be a file"),
        (("--json", "FILE/metrics.json"), "FILE is no folder"),
        (("--report-dir", "FILE"), "FILE is no folder"),
        (("--report-dir", "FILE/deep/report"), "FILE is no folder"),
    ],
)
def test_flags_are_checked_before_anything_is_read(flags, message, tmp_path, capsys):
    (tmp_path / "FILE").touch()
    (tmp_path / "FOLDER").mkdir()
    flag, value = flags
    value = str(tmp_path / value) if value.startswith("F") else value
    words = ["evaluate", str(tmp_path / "no model"), "--dataset", str(tmp_path / "no data"), flag, value]
    assert message in failure(capsys, words)


def test_the_possible_task_is_named(ours, folders, tmp_path, capsys):
    words = words_for(ours, folders, tmp_path, format="semantic")
    error = failure(capsys, words)
    assert "task 'panoptic' is not possible with format semantic_maps, allowed: semantic" in error
    assert error.endswith("panoptic is the model's task: choose --task semantic")
    error = failure(capsys, words_for(ours, folders, tmp_path, format="instance"))
    assert error.endswith("choose --task semantic or instance")
    asked = failure(capsys, [*words[:4], "--task", "panoptic", *words[4:]])
    assert "allowed: semantic; objects are read from maps of their ids (format instance_maps), one PNG" in asked
    assert asked.endswith("COCO JSON or YOLO texts")


def test_unreadable_images_are_counted_and_listed(ours, folders, tmp_path, capsys):
    root = tmp_path / "semantic"
    shutil.copytree(folders / "semantic", root)
    (root / "val" / "images" / "0.png").write_bytes(b"")
    words = words_for(
        ours, tmp_path, tmp_path, "--task", "semantic", "--report-dir", tmp_path / "r", format="semantic"
    )
    for _ in range(2):
        assert main(["evaluate", "--on-bad-sample", "skip", *words[1:]]) == 0
        assert json.loads((tmp_path / "r" / "metrics.json").read_text())["skipped"] == 1
        lines = (tmp_path / "r" / "images.csv").read_text().splitlines()
        assert len(lines) == 3
        assert lines[2].startswith(",")
        assert lines[2].endswith("0.png,,cannot be read")
        assert capsys.readouterr().out.count("skipped") == 1


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_columns_of_a_parquet_file_are_named_and_streamed(streaming, official, folders, tmp_path, capsys):
    """The same figures as the folder of label maps, also without an index and a length."""
    folder = folders / "semantic" / "val"
    rows = {
        "photo": [str(folder / "images" / f"{index}.png") for index in range(2)],
        "mask": [str(folder / "labels" / f"{index}.png") for index in range(2)],
    }
    features = datasets.Features({"photo": datasets.Image(), "mask": datasets.Image()})
    (tmp_path / "semantic").mkdir()
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "semantic" / "val.parquet")
    words = words_for(official, tmp_path, tmp_path, "--report-dir", tmp_path / "report", format="semantic")
    words += [f"streaming={streaming}", "id2label={0: grass, 1: cow}", "columns={image: photo, semantic_map: mask}"]
    assert main(words) == 0
    assert main(words_for(official, folders, tmp_path, "--json", tmp_path / "folder.json", format="semantic")) == 0
    assert {path.name for path in (tmp_path / "report").iterdir()} == REPORT
    found = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert found == json.loads((tmp_path / "folder.json").read_text())
    capsys.readouterr()
    assert "'picture'" in failure(capsys, [*words[:-1], "columns={image: picture}"])


def test_two_real_images(ours, shared_data, tmp_path):
    """133 classes against a model of 2 is an error; an untrained model of 133 gives all figures."""
    words = words_for(ours, shared_data, tmp_path, "--split", "examples", format="coco_panoptic_sample")
    assert main(words) == 2
    from hf_maskformer.data.load import load

    spec = load(shared_data / "coco_panoptic_sample", split="examples", cache_dir=str(tmp_path / "cache")).label_spec
    config = preset(
        "maskformer-light",
        id2label=spec.id2label,
        thing_label_ids=list(spec.thing_label_ids),
        image_size=[64, 64],
        num_queries=6,
    )
    model, report = tmp_path / "model", tmp_path / "report"
    HfMaskFormerForUniversalSegmentation(config).save_pretrained(model)
    image_processor_for(config).save_pretrained(model)
    more = ["--split", "examples", "--report-dir", report]
    assert main(words_for(model, shared_data, tmp_path, *more, format="coco_panoptic_sample")) == 0
    assert {path.name for path in report.iterdir()} == REPORT


@pytest.mark.slow
def test_two_processes_write_one_report(ours, folders, tmp_path):
    """Both images are scored, each by one process, and only one process writes."""
    report = tmp_path / "report"
    words = words_for(ours, folders, tmp_path, "--device", "cpu", "--report-dir", report)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    run = subprocess.run(
        [*launch, "-m", "hf_maskformer.cli.main", *words], capture_output=True, text=True, env=dict(os.environ)
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("report:") == 1
    assert len((report / "images.csv").read_text().splitlines()) == 3
    assert main(words_for(ours, folders, tmp_path, "--json", tmp_path / "one.json")) == 0
    assert json.loads((tmp_path / "one.json").read_text()) == json.loads((report / "metrics.json").read_text())
