"""How a peer is trained and measured: the images, the clock and the schedule of ours, its own loss and prediction."""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from training_peers import CANVAS, NATIVE, PEERS, Peer, Pixels
from training_table import MAIN_METRIC

from hf_maskformer.data.load import SegmentationData
from hf_maskformer.evaluation import MaskAveragePrecision, MeanIoU
from hf_maskformer.presets import image_processor_for, preset
from hf_maskformer.training.budget import Budget, TrainState
from hf_maskformer.training.config import TrainConfig
from hf_maskformer.training.optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from hf_maskformer.training.setup import load_splits
from hf_maskformer.training.trackers import ProgressBar, scalars
from hf_maskformer.training.train import move, open_batches

# AdamW's default weight decay, not on norms and biases; the rest is what from-scratch training needs to start well.
PEER_SETTINGS = {"schedule": "poly", "weight_decay": 0.01, "warmup_steps": 50, "max_grad_norm": 1.0}


def train_peer(config: TrainConfig, name: str, learning_rate: float) -> dict[str, Any]:
    """Figures of a peer after the budget of `config`, whose other options say which images it sees.

    A peer whose loss or gradient is not finite ends there: it has `diverged_at_step` and no metric.

    Raises:
        ValueError: there is no validation split, or the peer does not take this data.
    """
    train_data, val_data = load_splits(config)
    if val_data is None:
        raise ValueError("val_split is none; the comparison needs a validation split")
    spec = train_data.label_spec
    ours = preset(
        config.preset,
        id2label=spec.id2label,
        thing_label_ids=list(spec.thing_label_ids),
        task=train_data.task,
        **config.config_overrides,
    )
    processor = image_processor_for(ours, intensity_range=config.intensity_range)
    by_shortest_edge = config.image_resize == "shortest_edge"
    pixels = Pixels(tuple(ours.image_size), processor.image_mean, processor.image_std, by_shortest_edge)
    set_seed(config.seed)
    peer = PEERS[train_data.task][name](ours, spec, pixels)
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    batches = open_batches(config, train_data, processor, accelerator, first_step=0)
    images_per_step = config.batch_size * config.gradient_accumulation_steps
    budget = Budget(config, num_images=len(train_data), images_per_step=images_per_step)
    state, diverged = train_loop(config, peer, learning_rate, batches, accelerator, budget)
    del batches  # ends the reader processes
    figures = {
        "steps": state.step,
        "training_minutes": state.seconds / 60.0,
        "images_per_second": state.step * images_per_step / state.seconds,
        "data_wait_share": state.data_seconds / state.seconds,
        "parameters": sum(parameter.numel() for parameter in peer.model.parameters()),
    }
    if diverged:
        return {**figures, "diverged_at_step": state.step}
    by_view = {view: measured(peer, val_data, view) for view in useful_views(peer, val_data, pixels)}
    main = MAIN_METRIC[train_data.task]
    best = max(by_view, key=lambda view: by_view[view][main] or 0.0)
    return {**by_view[best], **figures, "view": best, "views": {view: by_view[view][main] for view in by_view}}


def train_loop(
    config: TrainConfig,
    peer: Peer,
    learning_rate: float,
    batches: Iterator[dict[str, Any]],
    accelerator: Accelerator,
    budget: Budget,
) -> tuple[TrainState, bool]:
    """Optimizer steps until the budget is spent; where it stands, and whether it diverged."""
    weight_decay = PEER_SETTINGS["weight_decay"]
    peer.model.to(accelerator.device)
    optimizer = accelerator.prepare(
        build_optimizer(peer.model, learning_rate=learning_rate, backbone_multiplier=1.0, weight_decay=weight_decay)
    )
    state = TrainState()
    peer.model.train()
    with ProgressBar(enabled=True) as bar:
        while not budget.spent(state):
            started = time.perf_counter()
            window = [move(next(batches), accelerator.device) for _ in range(config.gradient_accumulation_steps)]
            state.data_seconds += time.perf_counter() - started
            factor = learning_rate_factor(
                PEER_SETTINGS["schedule"],
                step=state.step,
                progress=budget.progress(state),
                warmup_steps=PEER_SETTINGS["warmup_steps"],
            )
            set_learning_rate(optimizer.param_groups, factor)
            loss = training_step(peer, optimizer, window, accelerator)
            state.step += 1
            state.seconds += time.perf_counter() - started
            bar.show(budget.progress(state), step=str(state.step), loss=f"{loss:.3f}")
            if not math.isfinite(loss):
                return state, True
    return state, False


def training_step(peer: Peer, optimizer: Any, window: list[dict[str, Any]], accelerator: Accelerator) -> float:
    """One step over an accumulation window; its mean loss. No step where loss or gradient is not finite: nan."""
    total = 0.0
    for batch in window:
        with accelerator.autocast():
            loss = peer.loss(batch) / len(window)
        accelerator.backward(loss)
        total += loss.item()
    norm = float(accelerator.clip_grad_norm_(peer.model.parameters(), PEER_SETTINGS["max_grad_norm"]))
    # The fp16 scaler itself passes over steps whose scaled gradients overflow.
    if not math.isfinite(total) or (not math.isfinite(norm) and accelerator.scaler is None):
        return math.nan
    optimizer.step()
    optimizer.zero_grad()
    return total


def useful_views(peer: Peer, data: SegmentationData, pixels: Pixels) -> list[str]:
    """The sizes at which to measure; one of them where no image is resized for the canvas."""
    rows = (data.row(index) for index in range(len(data)))
    if all(pixels.scale((row["height"], row["width"]), CANVAS) == 1.0 for row in rows) and NATIVE in peer.views:
        return [NATIVE]
    return list(peer.views)


def measured(peer: Peer, data: SegmentationData, view: str) -> dict[str, float | None]:
    """The metrics of the data's task over all its images, at their original size."""
    spec = data.label_spec
    semantic = data.task == "semantic"
    metric = MeanIoU(spec.num_labels, spec.ignore_index) if semantic else MaskAveragePrecision(spec.num_labels)
    peer.model.eval()
    for index in tqdm(range(len(data)), desc=f"evaluate, {view} size", unit="image"):
        with torch.inference_mode():
            prediction = peer.predict(data.image(index), view)
        metric.update([prediction], [data.reference(index)])
    return scalars(metric.compute())
