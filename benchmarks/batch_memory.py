"""What a training batch costs: one image with 100 instances, through our data path and through transformers'.

    python benchmarks/batch_memory.py [--size 1024] [--instances 100]

Each path runs in a process of its own and starts from its own input: ours from the stored run-length codes (`ours`) or
from the instance map (`ours, instance map`), transformers' from the same instance map. `peak` is the highest resident
memory above what the process held right before the call, `result` the bytes of the tensors that come back. The
result is touched page by page, so that memory which is only reserved counts too.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from process_memory import reset_peak, resident

from hf_maskformer.data.collate import Collator
from hf_maskformer.data.sample import Sample, make_segment, segment_masks
from hf_maskformer.model.image_processing_hf_maskformer import HfMaskFormerImageProcessor

PATHS = ("ours", "ours, instance map", "maskformer", "mask2former")
IGNORE_INDEX = 255
ALLOWED_PART = 0.25  # of transformers' peak
MMAP_THRESHOLD = 2**17  # bytes; glibc's own value, which setting it keeps from growing
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="height and width of the image")
    parser.add_argument("--instances", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5, help="calls that are timed, after the one that is measured")
    parser.add_argument("--path", choices=PATHS, help="measure one path in this process")
    parser.add_argument("--json", type=Path, default=Path(__file__).resolve().parent / "results" / "batch_memory.json")
    arguments = parser.parse_args()
    if arguments.path is not None:
        print(json.dumps(measure(arguments.path, arguments.size, arguments.instances, arguments.repeats)))
        return
    rows = [in_own_process(path, arguments) for path in PATHS]
    print(f"{'path':20} {'peak MiB':>9} {'result MiB':>11} {'seconds':>9}")
    for row in rows:
        print(f"{row['path']:20} {row['peak_mib']:9.1f} {row['result_mib']:11.1f} {row['seconds']:9.3f}")
    peers = min(row["peak_mib"] for row in rows if not row["path"].startswith("ours"))
    part = rows[0]["peak_mib"] / peers
    print(f"ours / transformers: {part:.3f} of the peak (at most {ALLOWED_PART} is wanted)")
    report = {"size": arguments.size, "instances": arguments.instances, "part_of_peak": part, "rows": rows}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def in_own_process(path: str, arguments: argparse.Namespace) -> dict[str, Any]:
    options = ("size", "instances", "repeats")
    flags = [word for name in options for word in (f"--{name}", str(getattr(arguments, name)))]
    command = [sys.executable, str(Path(__file__).resolve()), "--path", path, *flags]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD)}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def measure(path: str, size: int, instances: int, repeats: int) -> dict[str, Any]:
    """Peak and result of the first call on the large image; a small one before it loads what has to be loaded."""
    torch.set_num_threads(1)
    small = prepared(path, *picture(64, 3))
    small()
    call = prepared(path, *picture(size, instances))
    before = resident("VmRSS")
    reset_peak()
    batch = call()
    touch(batch)
    peak = resident("VmHWM") - before
    result = sum(tensor.numel() * tensor.element_size() for tensor in tensors(batch))
    count = len(batch["mask_labels"][0])
    if count != instances:
        raise RuntimeError(f"{path} gave {count} masks, expected {instances}")
    del batch
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return {"path": path, "peak_mib": peak / MIB, "result_mib": result / MIB, "seconds": min(seconds)}


def picture(size: int, instances: int) -> tuple[np.ndarray, np.ndarray]:
    """(size, size, 3) noise and its instance map: discs on a grid, each partly hidden by the next; 0 = background."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    ids = np.zeros((size, size), dtype=np.int32)
    side = int(np.ceil(np.sqrt(instances)))
    rows, columns = np.mgrid[:size, :size]
    for index in range(instances):
        top, left = ((np.array(divmod(index, side)) + 0.5) * size / side).tolist()
        ids[np.hypot(rows - top, columns - left) < 0.6 * size / side] = index + 1
    return image, ids


def prepared(path: str, image: np.ndarray, ids: np.ndarray) -> Callable[[], Any]:
    """The call to measure, with its input ready."""
    size = {"max_height": image.shape[0], "max_width": image.shape[1]}
    instances = np.unique(ids)[1:].tolist()
    if path == "ours":
        segments = [make_segment(number, 0, ids == number) for number in instances]
        row = {"height": ids.shape[0], "width": ids.shape[1]}
        labels = np.zeros(len(instances), dtype=np.int64)
        collate = Collator(HfMaskFormerImageProcessor(size=size))
        return lambda: collate([Sample(image, segment_masks(row, segments), labels)])
    table = dict.fromkeys(instances, 0)
    if path == "ours, instance map":
        processor = HfMaskFormerImageProcessor(size=size, do_resize=False)
        arguments: dict[str, Any] = {"instance_id_to_semantic_id": {**table, 0: IGNORE_INDEX}}
        return lambda: processor(image, segmentation_maps=ids, return_tensors="pt", **arguments)
    import transformers

    peer = {"maskformer": "MaskFormerImageProcessor", "mask2former": "Mask2FormerImageProcessor"}[path]
    processor = getattr(transformers, peer)(do_resize=False, ignore_index=0)
    arguments = {"instance_id_to_semantic_id": table}
    return lambda: processor([image], segmentation_maps=[ids], return_tensors="pt", **arguments)


def tensors(batch: Any) -> list[torch.Tensor]:
    lists = [batch[name] for name in ("mask_labels", "class_labels")]
    return [batch["pixel_values"], batch["pixel_mask"], *(tensor for tensor_list in lists for tensor in tensor_list)]


def touch(batch: Any) -> None:
    """Writes every tensor over itself."""
    for tensor in tensors(batch):
        tensor.add_(0) if tensor.dtype != torch.bool else tensor.logical_or_(torch.zeros((), dtype=torch.bool))


if __name__ == "__main__":
    main()
