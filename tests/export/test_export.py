"""Exported files give the model's numbers at every size, run in a Predictor, and are not kept where they differ."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_maskformer.cli.main import main
from hf_maskformer.data.load import load
from hf_maskformer.evaluation.evaluate import evaluate
from hf_maskformer.export import export as exporting
from hf_maskformer.export import variants
from hf_maskformer.export.agreement import ExportError, check, equal_pixels
from hf_maskformer.export.examples import example_inputs, resized
from hf_maskformer.export.export import export_model
from hf_maskformer.export.graph import LogitsGraph, SemanticGraph, trace
from hf_maskformer.inference import Predictor
from hf_maskformer.inference.checkpoint import load_checkpoint
from hf_maskformer.inference.onnx_model import OnnxModel
from hf_maskformer.presets import PRESETS, image_processor_for, list_presets
from model import variant_tester as tester

VARIANTS = ("fp16", "int8", "int8-dynamic")


def model_and_processor(name="maskformer-light", **overrides):
    """A shrunken model of one decoder layer and its processor."""
    config = tester.tiny(name, **{"query_decoder_layers": 1, **overrides})
    return tester.build(config).eval(), image_processor_for(config)


@pytest.fixture(scope="module")
def pair():
    """As few operations as a ResNet has: converting takes most of the time."""
    backbone = {**PRESETS["maskformer-light"].fields["backbone_config"], **tester.TINY_BACKBONES["resnet"]}
    return model_and_processor(backbone_config={**backbone, "depths": [1, 1, 1, 1]})


@pytest.fixture(scope="module")
def exported(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return export_model(*pair, folder, variants=VARIANTS, calibration_images=4)


def picture(height=40, width=60):
    return np.random.default_rng(0).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


def test_files_and_record(exported):
    folder = exported.files["float32"].parent
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["model.onnx", *(f"model.{name}.onnx" for name in VARIANTS), "preprocessor_config.json", "export.json"]
    )
    record = json.loads((folder / "export.json").read_text())
    assert record == exported.record
    assert record["free_size"] is True
    assert record["image_size"] == [tester.SIDE, tester.SIDE]
    assert 0 < max(record["largest_difference"].values()) < 1e-3
    megabytes = record["megabytes"]
    assert megabytes["fp16"] < 0.8 * megabytes["float32"]


def test_the_file_equals_the_model_at_sizes_it_was_not_made_with(exported, pair):
    model, processor = pair
    onnx_model = OnnxModel(exported.files["float32"])
    for scale, count in ((1.0, 3), (2.0, 1), (1.5, 2)):
        inputs = resized(example_inputs(processor, None, count), scale)
        with torch.no_grad():
            expected = model(**inputs)
        actual = onnx_model(**inputs)
        assert torch.equal(actual.valid_extent, expected.valid_extent)
        for name in ("class_queries_logits", "masks_queries_logits"):
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-3)


def test_a_predictor_runs_the_file(exported, pair):
    model, processor = pair
    expected = Predictor(model, processor=processor, device="cpu", threshold=0.0)(picture())[0]
    predictor = Predictor(exported.files["float32"], threshold=0.0)
    actual = predictor(picture())[0]
    assert actual.id2label == expected.id2label == tester.LABELS
    assert actual.task == expected.task
    assert actual.segmentation.shape == (40, 60)
    assert (actual.segmentation == expected.segmentation).mean() > 0.99


def test_evaluation_takes_the_file(exported):
    model, processor = load_checkpoint(exported.files["float32"])
    data = load("scenes", split="val", task="panoptic", length=2, image_size=64)
    processor.id2label = processor.thing_label_ids = None
    with pytest.raises(ValueError, match=r"has 3 classes but the data 7"):
        evaluate(model, processor, data, progress=False)


def test_variants_nearly_agree(exported, pair):
    _, processor = pair
    reference = OnnxModel(exported.files["float32"])
    for name in VARIANTS:
        assert equal_pixels(reference, OnnxModel(exported.files[name]), processor, images=2) > 0.9, name


def test_int8_convolutions_are_in_8_bits(exported):
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(str(exported.files["int8"])).graph
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    eight_bits = [name for name, kind in stored.items() if kind == onnx.TensorProto.INT8]
    assert len(eight_bits) >= 12  # convolutions of the backbone alone


def test_depthwise_and_small_convolutions_are_slower_in_8_bits(tmp_path):
    onnx = pytest.importorskip("onnx")
    shapes = {"large": (64, 64, 1, 1), "small": (8, 64, 1, 1), "depthwise": (640, 1, 3, 3)}
    weights = [onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in shapes.items()]
    nodes = [
        onnx.helper.make_node("Conv", ["x", name], [f"{name}_out"], group=640 if name == "depthwise" else 1)
        for name in shapes
    ]  # without names of their own
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], weights)), str(tmp_path / "m.onnx"))
    excluded = variants._slower_in_8_bits(tmp_path / "m.onnx")
    named = {node.name: node.input[1] for node in onnx.load(str(tmp_path / "m.onnx")).graph.node}
    assert len(named) == 3
    assert {named[name] for name in excluded} == {"small", "depthwise"}


def test_a_file_that_differs_is_not_kept(pair, tmp_path, monkeypatch):
    def wrong(program, graph, path):
        path.write_bytes(b"wrong")
        return lambda inputs: [value + 0.01 for value in graph(**inputs)]

    monkeypatch.setattr(exporting, "_write_onnx", wrong)
    monkeypatch.setattr(exporting, "trace", lambda *_, **__: None)
    message = r"class_queries_logits of the exported file differs .* by 0\.0\d+ .* 2 images of 64x64; no file was kept"
    with pytest.raises(ExportError, match=message), torch.no_grad():
        export_model(*pair, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_anchored_queries_may_come_in_another_order():
    model, processor = model_and_processor("maskformer-light-anchored")
    graph = LogitsGraph(model).eval()
    inputs = example_inputs(processor, None)

    def run(inputs, change=0.0):
        with torch.no_grad():
            outputs = [output.flip(1).clone() for output in graph(**inputs)]
        outputs[0][0, 0] += change
        return [output.numpy() for output in outputs]

    assert max(check(run, graph, [inputs]).largest_difference.values()) == 0
    with pytest.raises(ExportError, match="class_queries_logits of the exported file differs"):
        check(lambda inputs: run(inputs, 0.1), graph, [inputs])


def test_a_file_may_differ_as_much_as_rounding_changes_the_model():
    """Here a query's class hangs on the sign of a sum that is 0 but for rounding, as masked attention does."""

    class Unsteady(torch.nn.Module):
        outputs = ("class_queries_logits", "masks_queries_logits")
        model = SimpleNamespace(config=SimpleNamespace(query_decoder="masked"))

        def forward(self, pixel_values, pixel_mask):
            sign = (pixel_values.mean() - 0.1).sign()
            return sign.expand(1, 3, 4) * 0.01, pixel_values[:, :1]

    graph = Unsteady()
    inputs = {"pixel_values": torch.full((1, 3, 8, 8), 0.1), "pixel_mask": torch.ones(1, 8, 8)}

    def run(change):
        return lambda inputs: [graph(**inputs)[0] + change, graph(**inputs)[1]]

    agreement = check(run(0.009), graph, [inputs])
    assert agreement.largest_difference["class_queries_logits"] == pytest.approx(0.009)
    assert agreement.largest_difference_in_last_digits == {}
    with pytest.raises(ExportError, match=r"class_queries_logits .* by 0\.03 \(allowed: [12]e-02\)"):
        check(run(0.03), graph, [inputs])
    steady = {**inputs, "pixel_values": torch.full((1, 3, 8, 8), 0.5)}
    with pytest.raises(ExportError, match=r"class_queries_logits .* by 0\.009 \(allowed: 1e-03\)"):
        check(run(0.009), graph, [steady])


def test_a_file_may_give_what_the_model_gives_for_another_last_digit():
    """As a query that sees one cell by a mask logit of 0 but for rounding, and without it sees everything."""

    class Unsteady(torch.nn.Module):
        outputs = ("class_queries_logits", "masks_queries_logits")
        model = SimpleNamespace(config=SimpleNamespace(query_decoder="masked"))

        def forward(self, pixel_values, pixel_mask):
            sign = (pixel_values.flatten(1).double().mean(1) - 0.1).sign().float()  # (B,)
            return sign[:, None, None].expand(-1, 3, 4), pixel_values[:, :1]

    graph = Unsteady()
    pixels = torch.stack([torch.full((3, 8, 8), 0.1), torch.full((3, 8, 8), 0.5), torch.full((3, 8, 8), 0.1)])
    inputs = {"pixel_values": pixels, "pixel_mask": torch.ones(3, 8, 8)}
    assert graph(**inputs)[0][:, 0, 0].tolist() == [1, 1, 1]  # 0.1 in float32 is a little more

    def run(*factors, change=0.0):
        return lambda inputs: [
            graph(**inputs)[0] * torch.tensor(factors)[:, None, None] + change,
            graph(**inputs)[1],
        ]

    agreement = check(run(-1.0, 1.0, 1.0, change=1e-4), graph, [inputs])
    assert agreement.largest_difference["class_queries_logits"] == pytest.approx(2, abs=1e-3)
    assert agreement.largest_difference_in_last_digits["class_queries_logits"] == pytest.approx(1e-4, rel=1e-2)
    for factors in ((1.0, -1.0, 1.0), (0.5, 1.0, 1.0)):  # a steady image; one between both views
        with pytest.raises(ExportError, match=r"class_queries_logits .* by \d"):
            check(run(*factors), graph, [inputs])


def test_wrong_arguments(pair, tmp_path):
    with pytest.raises(ValueError, match=r"format must be one of onnx, torch-export, got 'tflite'"):
        export_model(*pair, tmp_path, format="tflite")
    with pytest.raises(ValueError, match=r"variants int8 are made of ONNX files with logits only"):
        export_model(*pair, tmp_path, semantic_map=True, variants=["int8"])


def test_files_that_are_none_of_ours(tmp_path):
    onnx = pytest.importorskip("onnx")
    with pytest.raises(ValueError, match=r"missing.onnx does not exist"):
        Predictor(tmp_path / "missing.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match=r"broken.onnx is no ONNX file that can be read"):
        Predictor(tmp_path / "broken.onnx")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "other", [value], [value])
    graph.output[0].name = "y"
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(tmp_path / "other.onnx"))
    with pytest.raises(ValueError, match=r"other.onnx was not written by `hf-maskformer export`"):
        Predictor(tmp_path / "other.onnx")


def test_the_processor_must_stand_beside_the_file(exported, tmp_path):
    (tmp_path / "model.onnx").write_bytes(exported.files["float32"].read_bytes())
    with pytest.raises(ValueError, match=r"no image processor \(preprocessor_config.json\)"):
        Predictor(tmp_path / "model.onnx")


def test_semantic_map_in_the_graph_is_the_processors():
    model, processor = model_and_processor(task="semantic")
    inputs = resized(example_inputs(processor, None), 1.0)
    inputs["pixel_mask"][:] = 1  # without padding the canvas is the image
    with torch.no_grad():
        (maps,) = SemanticGraph(model)(**inputs)
        expected = processor.post_process_semantic_segmentation(model(**inputs), target_sizes=[(64, 64)] * 2)
    assert (maps == torch.stack(expected)).float().mean() > 0.999


def test_command_writes_a_program_that_torch_loads(tmp_path, capsys):
    model, processor = model_and_processor(task="semantic")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    folder = tmp_path / "program"
    flags = ["--format", "torch-export", "--semantic-map", "--fixed-size", "--output-dir", str(folder)]
    assert main(["export", str(tmp_path / "model"), *flags]) == 0
    said = "images of 64 x 64 only; largest differences from the model: semantic_map 0.0e+00"
    assert said in capsys.readouterr().out
    inputs = example_inputs(processor, None)
    program = torch.export.load(folder / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(**inputs)[0], SemanticGraph(model)(**inputs)[0])


def test_a_model_of_things_only_takes_any_number_of_images():
    """Panoptic SegFormer has no query for stuff then."""
    model, processor = model_and_processor(
        "panoptic-segformer-light", task="instance", id2label={0: "a", 1: "b"}, thing_label_ids=[0, 1]
    )
    inputs = example_inputs(processor, None)
    graph = LogitsGraph(model).eval()
    program = trace(graph, inputs, free_size=False).module()
    three = {name: torch.cat([value, value[:1]]) for name, value in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(program(**three)[0], graph(**three)[0])


def test_a_file_of_one_size_takes_images_of_all_sizes(pair, tmp_path, caplog):
    """The model resizes by the shorter side, so its images have many sizes; the file's processor has one canvas."""
    model, _ = pair
    by_edge = image_processor_for(model.config, size={"shortest_edge": 32, "longest_edge": 64})
    exported = export_model(model, by_edge, tmp_path, fixed_size=True)
    assert exported.record["image_size"] == [32, 64]
    assert "fitted into 32x64 pixels" in caplog.text
    predictor = Predictor(exported.files["float32"], threshold=0.0)
    assert dict(predictor.processor.size) == {"max_height": 32, "max_width": 64}
    for size in ((40, 60), (60, 40), (32, 32)):
        assert predictor(picture(*size))[0].segmentation.shape == size


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in list_presets() if name.startswith(("lite", "maskformer", "mask2"))])
def test_every_preset_at_three_sizes(name, tmp_path):
    model, processor = model_and_processor(name)
    record = export_model(model, processor, tmp_path).record  # checks the sizes
    assert record["free_size"] != any(part in name for part in ("swin", "mask2former", "anchored"))
    assert max(record["largest_difference"].values()) < 1e-3
