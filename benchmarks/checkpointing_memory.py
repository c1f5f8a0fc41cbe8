"""What gradient checkpointing saves: the memory of one training step of a full-width model, and its gradients.

    python benchmarks/checkpointing_memory.py [--preset maskformer-swin-tiny] [--size 512] [--batch-size 2]

Each row runs in a process of its own, from the same seeds. `activations` is the most that the step's own tensors
(activations, gradients, temporary results) hold at one time, counted storage by storage as the step creates and drops
them: what a GPU's allocator calls allocated. `total` adds what is there before the step: weights and AdamW's two
moments. `resident` is the peak of the process's resident memory above that before the step (Linux, CPU only), `CUDA`
the peak that the allocator itself counts. `difference` is the largest difference of a gradient, divided by the
largest entry of the gradient of the same parameter.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from process_memory import reset_peak, resident
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from hf_maskformer.model.modeling_hf_maskformer import HfMaskFormerForUniversalSegmentation
from hf_maskformer.presets import preset
from hf_maskformer.training.train import checkpoint_activations

NUM_LABELS = 150
ALLOWED_DIFFERENCE = 1e-6
WANTED_SAVING = 0.35
WARM_UP_SIDE = 64
MMAP_THRESHOLD = 2**17  # bytes; glibc's own value, which setting it keeps from growing: freed tensors are given back
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="maskformer-swin-tiny")
    parser.add_argument("--size", type=int, default=512, help="height and width of the images")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--targets", type=int, default=20, help="masks of an image")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", choices=["plain", "checkpointed"], help="measure one way in this process")
    parser.add_argument("--gradients", type=Path, help="file for the gradients of --measure")
    results = Path(__file__).resolve().parent / "results"
    parser.add_argument("--json", type=Path, default=results / "checkpointing_memory.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure is not None:
        print(json.dumps(measure(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {way: Path(folder) / f"{way}.safetensors" for way in ("plain", "checkpointed")}
        rows = [in_own_process(way, file, arguments) for way, file in files.items()]
        difference = largest_difference(*(load_file(file) for file in files.values()))
    print(f"{'way':14} {'activations MiB':>16} {'total MiB':>10} {'resident MiB':>13} {'seconds':>8}")
    for row in rows:
        print(
            f"{row['way']:14} {row['activations_mib']:16.0f} {row['total_mib']:10.0f} "
            f"{row['resident_mib'] or float('nan'):13.0f} {row['seconds']:8.1f}"
        )
    saving = {name: 1 - rows[1][name] / rows[0][name] for name in ("activations_mib", "total_mib")}
    print(f"saved: {saving['activations_mib']:.1%} of the activations, {saving['total_mib']:.1%} of the total")
    print(f"(at least {WANTED_SAVING:.0%} is wanted); difference of the gradients: {difference:.1e}")
    options = ("preset", "size", "batch_size", "targets", "device", "threads")
    report: dict[str, Any] = {name: getattr(arguments, name) for name in options}
    report |= {"difference": difference, "saving": saving, "rows": rows, "torch": torch.__version__}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if difference > ALLOWED_DIFFERENCE:
        raise SystemExit(f"the gradients differ by {difference}; allowed is {ALLOWED_DIFFERENCE}")


def in_own_process(way: str, gradients: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    options = ("preset", "size", "batch-size", "targets", "device", "threads")
    flags = [word for name in options for word in (f"--{name}", str(getattr(arguments, name.replace("-", "_"))))]
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", way, "--gradients", str(gradients), *flags]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD)}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Memory and time of one forward and backward pass; its gradients go into `arguments.gradients`."""
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    labels = {index: f"class {index}" for index in range(NUM_LABELS)}
    size = [arguments.size, arguments.size]
    model = HfMaskFormerForUniversalSegmentation(preset(arguments.preset, id2label=labels, image_size=size)).to(device)
    if arguments.measure == "checkpointed":
        checkpoint_activations(model)
    model.train()
    inputs = batch(arguments, device, side=arguments.size)
    trained = sum(value.numel() * value.element_size() for value in model.parameters() if value.requires_grad)
    weights = sum(value.numel() * value.element_size() for value in model.parameters())
    step(model, batch(arguments, device, side=WARM_UP_SIDE))  # loads what is loaded once
    first_peak = peak_of_step(model, inputs, device)
    gradients = {name: value.grad.cpu() for name, value in model.named_parameters() if value.grad is not None}
    save_file(gradients, arguments.gradients)
    del gradients
    with LiveBytes([*model.parameters(), *model.buffers(), *tensors(inputs)]) as live:
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        step(model, inputs)
        seconds = time.perf_counter() - started
    return {
        "way": arguments.measure,
        "activations_mib": live.peak / MIB,
        "total_mib": (live.peak + weights + 2 * trained) / MIB,
        "weights_mib": weights / MIB,
        **first_peak,
        "seconds": seconds,
    }


def peak_of_step(model: Any, inputs: dict[str, Any], device: torch.device) -> dict[str, float | None]:
    """The peak as the process (CPU) or the allocator (CUDA) sees it, above what there was before the step."""
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(model, inputs)
        return {"resident_mib": None, "cuda_mib": (torch.cuda.max_memory_allocated(device) - before) / MIB}
    before = resident("VmRSS")
    reset_peak()
    step(model, inputs)
    return {"resident_mib": (resident("VmHWM") - before) / MIB, "cuda_mib": None}


def step(model: Any, inputs: dict[str, Any]) -> None:
    torch.manual_seed(1)  # of dropout
    model(**inputs).loss.backward()


def batch(arguments: argparse.Namespace, device: torch.device, *, side: int) -> dict[str, Any]:
    """Noise, and squares of random places and classes as targets; the last rows are padding."""
    generator = torch.Generator().manual_seed(2)
    images, targets = arguments.batch_size, arguments.targets
    valid = torch.ones(images, side, side, dtype=torch.int64)
    valid[:, -side // 16 :] = 0
    corners = torch.randint(0, side * 3 // 4, (images, targets, 2), generator=generator)
    masks = torch.zeros(images, targets, side, side, dtype=torch.bool)
    for image in range(images):
        for target in range(targets):
            top, left = corners[image, target].tolist()
            masks[image, target, top : top + side // 6, left : left + side // 6] = True
    return {
        "pixel_values": torch.randn(images, 3, side, side, generator=generator).to(device),
        "pixel_mask": valid.to(device),
        "mask_labels": [image_masks.to(device) for image_masks in masks],
        "class_labels": list(torch.randint(0, NUM_LABELS, (images, targets), generator=generator).to(device)),
    }


def tensors(inputs: dict[str, Any]) -> list[torch.Tensor]:
    return [tensor for value in inputs.values() for tensor in (value if isinstance(value, list) else [value])]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations create inside the block, until they are freed.

    Attributes:
        live: bytes held now.
        peak: the most there were.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        """`known` are the tensors that were there before: views of them are nothing new."""
        super().__init__()
        self.live = self.peak = 0
        self.storages: dict[int, tuple[weakref.ref[Any], int]] = {}
        for tensor in known:
            self.watch(tensor, counted=False)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(torch.Tensor, self.watch, function(*args, **(kwargs or {})))

    def watch(self, tensor: torch.Tensor, counted: bool = True) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self.storages:
            size = storage.nbytes() if counted else 0
            self.storages[key] = (weakref.ref(storage, lambda _: self.freed(key)), size)
            self.live += size
            self.peak = max(self.peak, self.live)
        return tensor

    def freed(self, key: int) -> None:
        self.live -= self.storages.pop(key)[1]


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of all parameters, each measured by its own largest gradient.

    Raises:
        ValueError: the two have the gradients of different parameters.
    """
    if one.keys() != other.keys():
        raise ValueError(f"gradients of other parameters: {sorted(one.keys() ^ other.keys())[:5]}")
    return max(float((one[name] - other[name]).abs().max() / one[name].abs().max().clamp(min=1e-30)) for name in one)


if __name__ == "__main__":
    main()
