"""The rows of the comparison: which are run, kept and replaced, and a few steps of every peer."""

import dataclasses
import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_maskformer.model.label_spec import LabelSpec
from hf_maskformer.model.masks import encode_rle
from hf_maskformer.presets import preset
from hf_maskformer.training.train import train

MODULES = ("train_compare", "training_loop", "training_peers", "training_rows", "training_table", "unet_peer")
PIXELS = {"canvas": (64, 64), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
NUCLEI = LabelSpec({0: "nucleus"}, thing_label_ids=(0,))
SCENES_THINGS = LabelSpec({0: "sky", 1: "box", 2: "disc"}, thing_label_ids=(1, 2))


@pytest.fixture
def benchmark(project_root, monkeypatch):
    """A module of benchmarks/ by its name, imported as the scripts there import each other."""
    monkeypatch.syspath_prepend(project_root / "benchmarks")
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def nuclei_folder(tmp_path):
    """Two images a split with two squares each, one class, as COCO instances."""
    for split, count in (("train", 2), ("val", 1)):
        (tmp_path / "cells" / split / "images").mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            masks = np.zeros((2, 40, 48), dtype=bool)
            masks[0, 4:16, 4 + number : 20] = True
            masks[1, 20:36, 22:40] = True
            pixels = np.where(masks.any(axis=0), 200, 30).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "cells" / split / "images" / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "height": 40, "width": 48})
            for mask in masks:
                area, box = int(mask.sum()), [0, 0, 48, 40]
                annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0}
                annotations.append({**annotation, "segmentation": encode_rle(mask), "area": area, "bbox": box})
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "nucleus"}]}
        (tmp_path / "cells" / split / "instances.json").write_text(json.dumps(content))
    return tmp_path / "cells"


def row(model="unet", rate=1e-3, seed=0, minutes=30.0, **figures):
    conditions = {"data": "nuclei", "task": "instance", "minutes": minutes, "device": "CPU (x86_64), 1 threads"}
    costs = {"steps": 900, "images_per_second": 2.0, "data_wait_share": 0.04, "parameters": 6_500_000}
    names = {"model": model, "learning_rate": rate, "seed": seed, "conditions": conditions, "settings": {"clip": 1.0}}
    return {**names, **costs, "map": 0.1, "map_50": 0.2, **figures}


def test_reporting_may_differ_and_training_may_not(benchmark, tiny_run):
    compare = benchmark("train_compare")
    config = tiny_run(max_steps=1, val_split=None)
    train(config)
    run = Path(config.output_dir)
    reporting = {"evaluations": 3, "eval_limit": 5, "eval_batch_size": 1, "log_every": 7, "num_samples": 0}
    other = dataclasses.replace(config, output_dir="elsewhere", checkpoint_every=9, keep_checkpoints=1, **reporting)
    figures = compare.ours_figures(other, run)
    assert figures["steps"] == 1
    assert figures["parameters"] > 0
    with pytest.raises(ValueError, match=r"was trained with learning_rate = 0\.001, wanted is 0\.002"):
        compare.ours_figures(dataclasses.replace(other, learning_rate=2e-3), run)


@pytest.mark.parametrize("model", ["segformer", "maskformer"])
def test_a_semantic_peer_takes_its_steps_and_is_measured(benchmark, tiny_run, model):
    figures = benchmark("training_loop").train_peer(tiny_run(task="semantic", max_steps=3), model, 1e-3)
    assert figures["steps"] == 3
    assert figures["images_per_second"] == pytest.approx(3 * 2 / (60 * figures["training_minutes"]))
    assert 0 <= figures["mean_iou"] <= 1
    assert 0 <= figures["data_wait_share"] <= 1
    assert set(figures["views"]) == {{"segformer": "native", "maskformer": "canvas"}[model]}  # scenes fill the canvas


def test_mask2former_takes_its_steps_and_is_measured(benchmark, tiny_run, nuclei_folder):
    config = tiny_run(
        dataset=str(nuclei_folder), task="instance", max_steps=2, dataset_options={}, val_dataset_options={}
    )
    figures = benchmark("training_loop").train_peer(config, "mask2former", 1e-3)
    assert figures["steps"] == 2
    assert 0 <= figures["map"] <= figures["map_50"] <= 1


def test_the_unet_takes_its_steps_and_is_measured_at_both_sizes(benchmark, tiny_run, nuclei_folder):
    pytest.importorskip("monai", reason="pip install hf_maskformer[benchmarks]")
    config = tiny_run(
        dataset=str(nuclei_folder), task="instance", max_steps=3, dataset_options={}, val_dataset_options={}
    )
    figures = benchmark("training_loop").train_peer(config, "unet", 1e-3)
    assert figures["steps"] == 3
    assert set(figures["views"]) == {"canvas", "native"}
    assert figures["map_50"] == max(figures["views"].values())


def test_training_ends_where_a_peer_diverges(benchmark, tiny_run, nuclei_folder, monkeypatch):
    loop, peers, unet = benchmark("training_loop"), benchmark("training_peers"), benchmark("unet_peer")

    class Exploding(unet.ThreeClassUNet):
        losses = 0

        def loss(self, batch):
            self.losses += 1
            return super().loss(batch) * (torch.nan if self.losses == 2 else 1.0)

    def make(ours, spec, pixels):
        return Exploding(ours, spec, pixels, network=torch.nn.Conv2d(3, 3, 1))

    monkeypatch.setitem(peers.PEERS["instance"], "unet", make)
    config = tiny_run(
        dataset=str(nuclei_folder), task="instance", max_steps=5, dataset_options={}, val_dataset_options={}
    )
    figures = loop.train_peer(config, "unet", 1e-3)
    assert figures["diverged_at_step"] == figures["steps"] == 2
    assert "map_50" not in figures


def test_a_label_map_is_painted_from_masks(benchmark):
    masks = torch.tensor([[[1, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 1, 1]]]).bool()
    painted = benchmark("training_peers").label_map(masks, torch.tensor([4, 2]), ignore_index=255)
    assert painted.tolist() == [[4, 4, 255], [255, 2, 2]]


def test_the_border_lies_inside_each_object(benchmark):
    """Two objects that touch in column 3|4; the right one runs out of the crop, and the last row is padding."""
    masks = torch.zeros((2, 6, 8), dtype=torch.bool)
    masks[0, 1:5, 0:4] = True
    masks[1, 0:5, 4:8] = True
    valid = torch.ones((6, 8), dtype=torch.int64)
    valid[5] = 0
    target = benchmark("unet_peer").three_class_target(masks, valid, width=1)
    void = -100
    assert target.tolist() == [
        [0, 0, 0, 0, 2, 1, 1, 1],
        [2, 2, 2, 2, 2, 1, 1, 1],
        [1, 1, 1, 2, 2, 1, 1, 1],
        [1, 1, 1, 2, 2, 1, 1, 1],
        [1, 1, 1, 2, 2, 1, 1, 1],
        [void] * 8,
    ]


def test_a_crop_without_objects_is_background(benchmark):
    valid = torch.ones((2, 3), dtype=torch.int64)
    target = benchmark("unet_peer").three_class_target(torch.zeros((0, 2, 3), dtype=torch.bool), valid)
    assert target.tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("width", [1, 2])
def test_decoding_the_target_gives_the_objects_back(benchmark, width):
    unet = benchmark("unet_peer")
    masks = torch.zeros((3, 20, 24), dtype=torch.bool)
    masks[0, 2:12, 0:9] = True
    masks[1, 3:14, 9:20] = True  # touches the first
    masks[2, 16:19, 2:4] = True  # 6 pixels, without an interior
    target = unet.three_class_target(masks, torch.ones((20, 24)), width=width)
    probabilities = np.where(np.arange(3)[:, None, None] == target.numpy(), 0.8, 0.1)
    probabilities[unet.INTERIOR, 8, 14] = 0.9  # the second object is surer of itself
    objects, scores = unet.decode_objects(probabilities, width)
    assert len(scores) == 2
    assert np.array_equal(objects == 1, masks[1].numpy())
    assert np.array_equal(objects == 2, masks[0].numpy())
    interior = (target[masks[1]] == unet.INTERIOR).sum().item()
    assert scores.tolist() == pytest.approx([0.8 + 0.1 / interior, 0.8])


def test_tiny_objects_and_those_beyond_the_limit_are_dropped(benchmark):
    decode = benchmark("unet_peer").decode_objects
    probabilities = np.zeros((3, 6, 12))
    probabilities[0] = 0.5
    for number, (columns, score) in enumerate([(slice(0, 2), 0.7), (slice(4, 7), 0.6), (slice(9, 12), 0.9)]):
        probabilities[1, 0 : 3 - (number == 0), columns] = score  # of 4, 9 and 9 pixels
    objects, scores = decode(probabilities, width=1, min_pixels=5)
    assert scores.tolist() == pytest.approx([0.9, 0.6])
    assert [(objects == number).sum() for number in (1, 2)] == [9, 9]
    objects, scores = decode(probabilities, width=1, min_pixels=1, limit=2)
    assert scores.tolist() == pytest.approx([0.9, 0.7])
    assert not objects[:, 4:7].any()
    objects, scores = decode(np.stack([np.ones((2, 2)), np.zeros((2, 2)), np.zeros((2, 2))]))
    assert objects.shape == (2, 2)
    assert len(scores) == 0


def test_the_unet_tells_objects_of_one_class_apart(benchmark):
    peers, unet = benchmark("training_peers"), benchmark("unet_peer")
    network = torch.nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match=r"one class apart; the data has the things \['box', 'disc'\]"):
        unet.ThreeClassUNet(preset("maskformer-light"), SCENES_THINGS, peers.Pixels(**PIXELS), network)
    peer = unet.ThreeClassUNet(preset("maskformer-light"), NUCLEI, peers.Pixels(**PIXELS), network)
    assert peer.logits(torch.zeros(1, 3, 17, 30)).shape == (1, 3, 17, 30)


def test_an_image_is_seen_as_it_is_or_inside_the_canvas(benchmark):
    pixels = benchmark("training_peers").Pixels(**PIXELS)
    image = np.full((32, 128, 3), 255, dtype=np.uint8)
    assert pixels.network_image(image, "native").shape == (1, 3, 32, 128)
    seen = pixels.network_image(image, "canvas")
    assert seen.shape == (1, 3, 16, 64)
    assert seen.unique().tolist() == pytest.approx([2.0])  # (1 - 0.5) / 0.25


def test_an_image_is_resized_by_its_shorter_side_where_ours_is(benchmark):
    pixels = benchmark("training_peers").Pixels((16, 32), (0.5,) * 3, (0.25,) * 3, True)
    assert pixels.scale((8, 8), "canvas") == 2.0
    assert pixels.scale((32, 24), "canvas") == 16 / 24
    assert pixels.scale((8, 64), "canvas") == 0.5  # the longer side may have 32 pixels
    assert pixels.scale((8, 64), "native") == 1.0


def test_conditions_name_what_is_resized_by_the_shorter_side(benchmark):
    data_name = benchmark("training_table").data_name
    assert data_name({"data": "cells", "canvas": [512, 512]}) == "cells"
    by_edge = {"data": "cells", "canvas": [1024, 512], "image_resize": "shortest_edge"}
    assert data_name(by_edge) == "cells, shorter side 512"


def test_a_missing_package_is_named_before_anything_runs(benchmark, monkeypatch):
    peers = benchmark("training_peers")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    peers.check_packages(["ours", "mask2former"])
    with pytest.raises(ValueError, match=r"'unet' needs the package monai.*pip install hf_maskformer\[benchmarks\]"):
        peers.check_packages(["ours", "unet"])


def test_the_runs_that_are_asked_for(benchmark):
    cells = benchmark("train_compare").chosen_cells
    assert cells("semantic", None, [1e-4, 1e-3], None) == [
        ("ours", None),
        *[("segformer", rate) for rate in (1e-4, 1e-3)],
        *[("maskformer", rate) for rate in (1e-4, 1e-3)],
    ]
    assert cells("instance", ["unet"], [1e-4], None) == [("unet", 1e-4)]
    assert cells("instance", None, [1e-4], ["unet:3e-4", "ours"]) == [("unet", 3e-4), ("ours", None)]
    with pytest.raises(ValueError, match="'unet' is not known for task 'semantic'; allowed: ours, segformer"):
        cells("semantic", ["unet"], [1e-4], None)
    with pytest.raises(ValueError, match="ours has its recipe's"):
        cells("instance", None, [1e-4], ["ours:1e-3"])
    with pytest.raises(ValueError, match="'fast' is no number"):
        cells("instance", None, [1e-4], ["unet:fast"])
    with pytest.raises(ValueError, match="'-1' must be greater than 0"):
        cells("instance", None, [1e-4], ["unet:-1"])


def test_data_that_is_not_there_is_named(benchmark, monkeypatch, tmp_path):
    compare = benchmark("train_compare")
    (tmp_path / "camvid").mkdir()
    monkeypatch.setenv("HF_MASKFORMER_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    assert compare.find_data("camvid") == tmp_path / "camvid"
    with pytest.raises(ValueError, match="'camvit': no such folder"):
        compare.find_data("camvit")


def test_rows_with_the_same_settings_are_kept_and_others_replaced(benchmark, tmp_path):
    rows = benchmark("training_rows")
    path = tmp_path / "results" / "rows.json"
    assert rows.read_rows(path) == []
    first = row(rate=1e-4, map_50=0.3)
    rows.add_row(path, first)
    rows.add_row(path, row(rate=1e-3))
    rows.add_row(path, row("ours", rate=2e-3))
    assert rows.finished_row(rows.read_rows(path), first)["map_50"] == 0.3
    assert rows.finished_row(rows.read_rows(path), row(rate=3e-4)) is None
    assert rows.finished_row(rows.read_rows(path), row(rate=1e-4, seed=1)) is None
    changed = {**first, "settings": {"clip": 2.0}, "map_50": 0.4}
    assert rows.finished_row(rows.read_rows(path), changed) is None
    rows.add_row(path, changed)
    rows.add_row(path, row("ours", rate=5e-4, map_50=float("nan")))  # the recipe's rate changed: still the one row
    found = [(one["model"], one["learning_rate"], one["map_50"]) for one in rows.read_rows(path)]
    assert found == [("unet", 1e-3, 0.2), ("unet", 1e-4, 0.4), ("ours", 5e-4, None)]
    assert [file.name for file in path.parent.iterdir()] == ["rows.json"]


def test_rows_that_end_together_are_all_kept(benchmark, tmp_path):
    rows = benchmark("training_rows")
    path = tmp_path / "rows.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: rows.add_row(path, row(seed=seed)), range(40)))
    assert sorted(one["seed"] for one in rows.read_rows(path)) == list(range(40))


def test_a_wanted_row_is_found_again_in_the_file(benchmark, tiny_run, tmp_path):
    compare, rows = benchmark("train_compare"), benchmark("training_rows")
    config = tiny_run(task="instance", crop_size=(64, 64), scale_range=(0.5, 2.0))
    for model, rate in (("ours", None), ("mask2former", 1e-3)):
        wanted = compare.wanted_row(config, "recipe.yaml", model, rate)
        rows.add_row(tmp_path / "rows.json", {**wanted, "map_50": 0.5})
        again = compare.wanted_row(dataclasses.replace(config, output_dir="elsewhere"), "recipe.yaml", model, rate)
        assert rows.finished_row(rows.read_rows(tmp_path / "rows.json"), again)["map_50"] == 0.5
    slower = dataclasses.replace(config, learning_rate=1e-5)
    known = rows.read_rows(tmp_path / "rows.json")
    assert rows.finished_row(known, compare.wanted_row(slower, "recipe.yaml", "ours", None)) is None
    assert rows.finished_row(known, compare.wanted_row(slower, "recipe.yaml", "mask2former", 1e-3)) is not None
    wider = dataclasses.replace(config, scale_range=(0.1, 2.0))
    assert rows.finished_row(known, compare.wanted_row(wider, "recipe.yaml", "mask2former", 1e-3)) is None


def test_a_stopped_run_of_ours_goes_on_and_a_finished_one_does_not(benchmark, tmp_path):
    folder = benchmark("train_compare").unfinished_folder
    first = folder(tmp_path, row("ours"))
    first.mkdir()
    assert folder(tmp_path, row("ours")) == first
    assert folder(tmp_path, row("ours", minutes=15.0)) != first
    (first / "metrics.json").write_text("{}")
    assert folder(tmp_path, row("ours")).name == first.name[:-1] + "2"


def test_the_table_shows_the_best_rate_of_each_model(benchmark):
    table = benchmark("training_table")
    assert table.comparison([]) == []
    lines = table.comparison(
        [
            row(minutes=1.0, map_50=0.99),  # other conditions: not shown
            row(rate=1e-4, map_50=0.3),
            row(rate=1e-3, map_50=0.6, map=0.37),
            row("mask2former", rate=1e-4, map_50=0.04),
            {name: value for name, value in row("mask2former").items() if not name.startswith("map")},
            row("ours", rate=5e-4, map_50=0.5, preset="maskformer-light", recipe="nuclei_instance.yaml"),
        ]
    )
    assert lines[0].startswith("nuclei (`benchmarks/train_compare.py --data nuclei --minutes 30`, CPU (x86_64), ")
    assert "seed 0): 30 minutes of training each" in lines[0]
    assert lines[4:8] == [
        "| ours: `maskformer-light`, `recipes/nuclei_instance.yaml` "
        "| 0.100 | 0.500 | 0.0005 | 900 | 2.0 | 4 % | 6.5M |",
        "| MONAI's UNet, three classes, connected components | 0.370 | 0.600 | 0.001 | 900 | 2.0 | 4 % | 6.5M |",
        "| transformers' Mask2Former, backbone of ours | 0.100 | 0.040 | 0.0001 | 900 | 2.0 | 4 % | 6.5M |",
        "",
    ]
    assert "UNet, three classes, connected components: 0.300 at 0.0001, 0.600 at 0.001" in lines[8]
    assert "Mask2Former, backbone of ours: 0.040 at 0.0001, diverged at 0.001" in lines[8]


def test_the_table_averages_seeds(benchmark):
    lines = benchmark("training_table").comparison([row(map_50=0.2), row(map_50=0.4, seed=1)])
    assert "mean of the seeds 0, 1" in lines[0]
    assert "| 0.300 |" in lines[4]
