"""transformers' Trainer: the same step as our loop, the same figures as evaluate(), and LoRA adapters with both."""

import copy
import json
import re

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import EvalPrediction, Trainer, TrainingArguments

from hf_maskformer.data import TrainAugmentation, TrainingDataset, load
from hf_maskformer.evaluation.evaluate import evaluate
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.presets import image_processor_for, preset
from hf_maskformer.training import EvaluationDataset, HfMaskFormerTrainer, TrainerCollator, TrainerMetrics
from hf_maskformer.training.optimizer import parameter_groups
from hf_maskformer.training.train import training_step

LORA_TARGETS = r"model\.(backbone|pixel_decoder|query_decoder)\..*\.(convolution|conv|query|value|expand|contract)"

# One step of the trainer named in argv[2] from the model in argv[1], over 6 scenes in 2 processes; SGD with rate 1.
ONE_STEP = """
import sys
import torch
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments
from hf_maskformer.data import TrainingDataset, load
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor
from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.training import HfMaskFormerTrainer, TrainerCollator

folder, name = sys.argv[1:]
model = HfMaskFormerForUniversalSegmentation.from_pretrained(folder, dtype=torch.float64)
trainer = {"plain": Trainer, "ours": HfMaskFormerTrainer}[name](
    model=model,
    args=TrainingArguments(
        folder + "/trainer", per_device_train_batch_size=1, gradient_accumulation_steps=3, max_steps=1,
        max_grad_norm=0.0, lr_scheduler_type="constant", use_cpu=True, ddp_backend="gloo", report_to="none",
        save_strategy="no", disable_tqdm=True,
    ),
    train_dataset=TrainingDataset(load("scenes", split="train", image_size=64, length=6)),
    data_collator=TrainerCollator(HfMaskFormerImageProcessor.from_pretrained(folder)),
    optimizers=(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0), None),
)
trainer.train()
assert trainer.args.world_size == 2
if trainer.is_world_process_zero():
    save_file({n: p.detach().clone() for n, p in model.named_parameters()}, f"{folder}/{name}.safetensors")
"""


@pytest.fixture
def tiny(tiny_run):
    """Model (float32, frozen norms, so that a gradient is a sum over images) and processor for panoptic scenes."""
    torch.manual_seed(0)
    spec = scenes("train", 1).label_spec
    fields = {"id2label": spec.id2label, "thing_label_ids": list(spec.thing_label_ids), "task": "panoptic"}
    overrides = {**tiny_run().config_overrides, "backbone_freeze_batch_norm": True}
    model = HfMaskFormerForUniversalSegmentation(preset("maskformer-light", **fields, **overrides))
    return model, image_processor_for(model.config)


def scenes(split, length, size=64):
    return load("scenes", split=split, image_size=size, length=length)


def arguments(tmp_path, **changes):
    fields = {
        "output_dir": str(tmp_path / "trainer"),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "batch_eval_metrics": True,
        "eval_do_concat_batches": False,
    }
    return TrainingArguments(**{**fields, **changes})


def gradients_by_trainer(trainer_class, model, processor, tmp_path, *, images, batch_size, accumulation):
    """Loss and gradients of one step over `images` scenes: SGD with rate 1 takes the gradient off the weights."""
    model = copy.deepcopy(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    trainer = trainer_class(
        model=model,
        args=arguments(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
        ),
        train_dataset=TrainingDataset(scenes("train", images)),
        data_collator=TrainerCollator(processor),
        optimizers=(optimizer, None),
    )
    loss = trainer.train().training_loss
    return loss, {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}


def gradients_by_loop(model, processor, *, images, batch_size):
    model = copy.deepcopy(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    samples = [scenes("train", images).sample(index) for index in range(images)]
    collate = TrainerCollator(processor)
    window = [
        {**collate(samples[start : start + batch_size]), "image_ids": []} for start in range(0, images, batch_size)
    ]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(window))
    values = training_step(accelerator, model.train(), optimizer, window, step=0, max_grad_norm=None)
    return values["loss"], {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}


def largest_difference(one, other):
    """Largest difference of two sets of gradients over the largest gradient."""
    scale = max(float(gradient.abs().max()) for gradient in one.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) / scale


@pytest.mark.parametrize(
    ("images", "batch_size", "accumulation"), [(4, 4, 1), (4, 2, 2), (6, 2, 4)], ids=["1x4", "2x2", "short window"]
)
def test_loss_and_gradients_equal_those_of_our_loop(tiny, tmp_path, images, batch_size, accumulation):
    model, processor = tiny[0].double(), tiny[1]
    loss, gradients = gradients_by_loop(model, processor, images=images, batch_size=images)
    found_loss, found = gradients_by_trainer(
        HfMaskFormerTrainer,
        model,
        processor,
        tmp_path,
        images=images,
        batch_size=batch_size,
        accumulation=accumulation,
    )
    assert found_loss == pytest.approx(loss, rel=1e-6)  # both are logged in float32
    assert largest_difference(gradients, found) < 1e-9
    assert all(gradient.abs().max() > 0 for name, gradient in found.items() if name.endswith("mask_projection.weight"))


def test_plain_trainer_trains_but_is_not_exact_over_accumulation(tiny, tmp_path):
    model, processor = tiny[0].double(), tiny[1]
    _, expected = gradients_by_loop(model, processor, images=4, batch_size=4)
    differences = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        _, found = gradients_by_trainer(
            Trainer, model, processor, tmp_path, images=4, batch_size=batch_size, accumulation=accumulation
        )
        differences.append(largest_difference(expected, found))
    assert differences[0] < 1e-9
    assert differences[1] > 1e-3


@pytest.mark.slow
def test_two_processes_with_accumulation_take_the_step_of_one(tiny, tmp_path, in_processes):
    """And the plain Trainer does not, so that the comparison can fail."""
    model, processor = tiny[0].double(), tiny[1]
    _, expected = gradients_by_loop(model, processor, images=6, batch_size=6)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    differences = {}
    for name in ("ours", "plain"):
        results = in_processes(ONE_STEP, str(tmp_path), name)
        assert [one.code for one in results] == [0, 0], results[0].errors + results[1].errors
        after = load_file(tmp_path / f"{name}.safetensors")
        found = {key: value.detach() - after[key] for key, value in model.named_parameters()}
        differences[name] = largest_difference(expected, found)
    assert differences["ours"] < 1e-9
    assert differences["plain"] > 1e-3


@pytest.mark.parametrize(("trainer_class", "task"), [(HfMaskFormerTrainer, "panoptic"), (Trainer, "semantic")])
def test_evaluation_gives_the_figures_of_evaluate(tiny, tmp_path, trainer_class, task):
    """The images are larger than the canvas of the model, and their number is no multiple of the batch."""
    model, processor = tiny
    processor.threshold = processor.overlap_mask_area_threshold = 0.0  # else random weights predict nothing
    data = scenes("val", 3, size=96)
    trainer = trainer_class(
        model=model,
        args=arguments(tmp_path),
        eval_dataset=EvaluationDataset(data),
        data_collator=TrainerCollator(processor),
        compute_metrics=TrainerMetrics(model, processor, data, task, boundary=True),
    )
    expected = evaluate(model, processor, data, task, batch_size=2, progress=False, boundary=True)
    for _ in range(2):  # the second evaluation starts anew
        found = trainer.evaluate()
        assert found["eval_loss"] > 0
        assert {name: json.dumps(found[f"eval_{name}"]) for name in expected} == {
            name: json.dumps(value) for name, value in expected.items()
        }
    assert 0 < expected["mean_iou"] < 1


def test_trained_checkpoint_loads_with_from_pretrained(tiny, tmp_path):
    model, processor = tiny
    data = scenes("val", 2)
    trainer = HfMaskFormerTrainer(
        model=model,
        args=arguments(
            tmp_path, max_steps=3, save_strategy="steps", eval_strategy="steps", save_steps=3, eval_steps=3
        ),
        train_dataset=TrainingDataset(scenes("train", 6), TrainAugmentation(crop_size=(48, 48))),
        eval_dataset=EvaluationDataset(data),
        data_collator=TrainerCollator(processor, crop_size=(48, 48)),
        compute_metrics=TrainerMetrics(model, processor, data),
        processing_class=processor,
    )
    trainer.train()
    assert {"eval_pq", "eval_mean_iou", "eval_map"} <= set(trainer.state.log_history[-2])
    folder = tmp_path / "trainer" / "checkpoint-3"
    loaded = HfMaskFormerForUniversalSegmentation.from_pretrained(folder)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    assert HfMaskFormerImageProcessor.from_pretrained(folder).size["max_height"] == 64


def metrics_and_prediction(tiny, data, order):
    """A metric over `data`, and what Trainer would hand it after one batch of the images in `order`."""
    model, processor = tiny
    batch = TrainerCollator(processor)([EvaluationDataset(data)[index] for index in order])
    with torch.no_grad():
        outputs = model.eval()(**batch)
    values = tuple(value for name, value in outputs.items() if name != "loss")
    labels = (batch["mask_labels"], batch["class_labels"])
    return TrainerMetrics(model, processor, data), EvalPrediction(predictions=values, label_ids=labels)


def test_other_images_than_those_of_the_data_are_refused(tiny):
    data = scenes("val", 3)
    labels = [tuple(data.sample(index).class_labels) for index in range(3)]
    assert len(set(labels)) == 3
    metrics, prediction = metrics_and_prediction(tiny, data, [1, 0, 2])
    with pytest.raises(ValueError, match=r"has other classes than the image evaluated in its place"):
        metrics(prediction, compute_result=True)
    metrics, prediction = metrics_and_prediction(tiny, data, [0, 1])
    with pytest.raises(ValueError, match="2 of the data's 3 images were evaluated"):
        metrics(prediction, compute_result=True)
    assert metrics(prediction, compute_result=False) == {}
    with pytest.raises(ValueError, match="more images were evaluated than the data's 3"):
        metrics(prediction, compute_result=False)


def test_missing_arguments_are_named(tiny):
    metrics, prediction = metrics_and_prediction(tiny, scenes("val", 2), [0, 1])
    with pytest.raises(ValueError, match="needs batch_eval_metrics=True"):
        metrics(prediction)
    without_extent = EvalPrediction(predictions=prediction.predictions[:-1], label_ids=prediction.label_ids)
    with pytest.raises(ValueError, match="valid extents"):
        metrics(without_extent, compute_result=True)


def test_whole_images_and_training_samples_do_not_share_a_batch(tiny):
    data = scenes("val", 2)
    with pytest.raises(ValueError, match="mixes 1 training samples and 1 whole images"):
        TrainerCollator(tiny[1])([data.sample(0), EvaluationDataset(data)[1]])


@pytest.fixture
def lora(tiny):
    """The tiny model with adapters in backbone, pixel decoder and query decoder, and its weights without them."""
    peft = pytest.importorskip("peft")
    model = tiny[0]
    plain = copy.deepcopy(model)
    config = peft.LoraConfig(r=2, target_modules=LORA_TARGETS, modules_to_save=["class_head"])
    return peft.get_peft_model(model, config), plain


def check_adapters(adapted, plain, processor, folder):
    """Only adapters and the class head changed, in each part; saved and loaded again they give equal outputs."""
    from peft import PeftModel

    base = {
        name.replace(".base_layer", "").replace(".original_module", ""): value
        for name, value in adapted.get_base_model().state_dict().items()
    }
    for name, value in plain.state_dict().items():
        assert torch.equal(value, base[name]), name
    moved = [n for n, p in adapted.named_parameters() if "lora_B" in n and p.detach().abs().max() > 0]
    for part in ("backbone", "pixel_decoder", "query_decoder"):
        assert any(f".{part}." in name for name in moved), part
    adapted.save_pretrained(folder)
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert all("lora_" in name or "class_head" in name for name in names)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), folder)
    inputs = TrainerCollator(processor)([scenes("val", 1).sample(0)])
    with torch.no_grad():
        expected, found, without = (model.eval()(**inputs) for model in (adapted, loaded, plain))
    assert torch.equal(found.masks_queries_logits, expected.masks_queries_logits)
    assert torch.equal(found.class_queries_logits, expected.class_queries_logits)
    assert not torch.equal(without.masks_queries_logits, expected.masks_queries_logits)


def test_lora_with_trainer(lora, tiny, tmp_path):
    adapted, plain = lora
    data = scenes("val", 2)
    trainer = HfMaskFormerTrainer(
        model=adapted,
        args=arguments(tmp_path, max_steps=2, learning_rate=1e-2, gradient_accumulation_steps=2),
        train_dataset=TrainingDataset(scenes("train", 6)),
        eval_dataset=EvaluationDataset(data),
        data_collator=TrainerCollator(tiny[1]),
        compute_metrics=TrainerMetrics(adapted, tiny[1], data),
    )
    trainer.train()
    assert {"eval_loss", "eval_pq"} <= set(trainer.evaluate())
    check_adapters(adapted, plain, tiny[1], tmp_path / "adapter")


def test_lora_with_our_loop(lora, tiny, tmp_path):
    adapted, plain = lora
    model = adapted.get_base_model()  # holds the adapters, under the names that the backbone's learning rate goes by
    groups = parameter_groups(model, learning_rate=1e-2, backbone_multiplier=0.1, weight_decay=0.0)
    rates = {name: group["lr"] for group in groups for name in group["parameter_names"]}
    assert all("lora_" in name or "class_head.modules_to_save" in name for name in rates)
    assert {rate for name, rate in rates.items() if name.startswith("model.backbone.")} == {1e-3}
    optimizer = torch.optim.AdamW(groups)
    collate = TrainerCollator(tiny[1])
    samples = [scenes("train", 4).sample(index) for index in range(4)]
    window = [{**collate(samples[start : start + 2]), "image_ids": []} for start in (0, 2)]
    for step in range(2):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        training_step(accelerator, model.train(), optimizer, window, step=step, max_grad_norm=1.0)
    check_adapters(adapted, plain, tiny[1], tmp_path / "adapter")


def readme_examples(project_root):
    section = (project_root / "README.md").read_text().split("## With transformers' Trainer")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_readme_examples_run(tiny_run, tmp_path, monkeypatch, project_root):
    """As they stand, but for fewer and smaller images, a smaller model and a single step."""
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_maskformer.data.load", lambda *_, split: scenes(split, 4))
    overrides = {**tiny_run().config_overrides, "backbone_freeze_batch_norm": True}
    monkeypatch.setattr("hf_maskformer.preset", lambda name, **fields: preset(name, **fields, **overrides))
    training, adapting = readme_examples(project_root)
    for text, smaller in (
        ("max_steps=1000", "max_steps=1, use_cpu=True, report_to='none', per_device_train_batch_size=1"),
        ("(256, 256)", "(64, 64)"),
    ):
        assert training.count(text) == 1
        training = training.replace(text, smaller)
    names = {}
    exec(training, names)
    assert any("eval_pq" in entry for entry in names["trainer"].state.log_history)
    exec(adapting, names)
    adapters = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("backbone" in name for name in adapters)
    assert any("query_decoder" in name for name in adapters)


def test_one_process_with_several_gpus_is_refused(tiny, tmp_path):
    trainer = HfMaskFormerTrainer(model=tiny[0], args=arguments(tmp_path), data_collator=TrainerCollator(tiny[1]))
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="one process sees 2 GPUs: start one process for each"):
        trainer.get_batch_samples(iter([]), 1, trainer.args.device)


def test_at_the_end_of_the_data_there_is_no_batch(tiny, tmp_path):
    trainer = HfMaskFormerTrainer(model=tiny[0], args=arguments(tmp_path), data_collator=TrainerCollator(tiny[1]))
    assert trainer.get_batch_samples(iter([]), 2, trainer.args.device) == ([], None)
