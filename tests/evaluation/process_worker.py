"""One of several processes that evaluate their share of some scenes and write what each of them returned.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 python tests/evaluation/process_worker.py OUT
"""

import json
import sys
from dataclasses import astuple
from pathlib import Path

import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hf_maskformer.data.load import load
from hf_maskformer.evaluation.details import EvaluationDetails
from hf_maskformer.evaluation.evaluate import evaluate
from model_answers import Oracle, processor_for

IMAGES, WRONG = 5, {1, 3}


def evaluated(across_processes: bool, first_row: int = 0) -> dict:
    data = load("scenes", split="val", task="panoptic", length=IMAGES, image_size=(48, 64))
    oracle = Oracle(data, wrong=WRONG)
    oracle.next_row = first_row
    details = EvaluationDetails(worst=3)
    metrics = evaluate(
        oracle,
        processor_for(data),
        data,
        batch_size=2,
        progress=False,
        details=details,
        across_processes=across_processes,
    )
    return {
        "metrics": metrics,
        "images": [astuple(image) for image in details.images],
        "worst": [image.index for image in details.worst],
        "confusion": details.confusion.matrix.tolist(),
    }


def main(out: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, count = distributed.get_rank(), distributed.get_world_size()
    result = evaluated(across_processes=True, first_row=IMAGES * rank // count)
    Path(out, f"{rank}.json").write_text(json.dumps(result))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
