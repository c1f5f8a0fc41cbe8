"""Write the figures of benchmarks/results/*.json into README and docs/, and the model cards of all presets.

    python benchmarks/report.py

No figure in these tables is typed in: each stands in a JSON file that a seeded command of this repository wrote. The
pages keep their text around the markers; the files of model_cards/ are written whole.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from complexity import figures_table as complexity_table
from convergence import table
from export_quantized import table as quantized_table
from headline import fast, trained
from members import table as members_table
from realtime import table as realtime_table
from speed import SUITES
from training_rows import OURS, read_rows
from training_table import comparison

from hf_maskformer.cli.quickstart import PRESET as QUICKSTART_PRESET
from hf_maskformer.hub.preset_card import preset_card
from hf_maskformer.presets import PRESETS, list_presets, preset

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CARDS = ROOT / "model_cards"
# Page -> the sections it holds, each between <!-- NAME: begin --> and <!-- NAME: end -->.
PAGES = {
    "README.md": ("headline",),
    "docs/results.md": ("quickstart", "comparison", "members", "start", "padding", "realtime", "complexity", "tools"),
    "docs/performance.md": ("speed", "bf16", "export", "stream"),
}
PADDING_PRESET = "maskformer-light"  # of the CamVid model that benchmarks/padding.py is run with
CONVERGENCE_PRESETS = {"camvid": "maskformer-light", "nuclei": "maskformer-light-anchored"}
MEMBERS_PRESET = "mask2former-light"  # whose card holds these figures
FAMILY = ""  # figures of all presets, which no card repeats
ADE20K_LABELS, COCO_PANOPTIC_LABELS, CAMVID_LABELS = 150, 133, 11
COCO_THINGS = list(range(80))
# Presets that the paper trained with COCO's 80 things and 53 classes of stuff, not with ADE20K.
ON_COCO = ("maskformer-r50-panoptic", "mask2former-", "panoptic-segformer-")


def main() -> None:
    for page, text in pages().items():
        (ROOT / page).write_text(text)
    for name in list_presets():
        (CARDS / f"{name}.md").write_text(card(name))


def pages() -> dict[str, str]:
    """Text of each page with its sections as the results say now.

    Raises:
        ValueError: a page does not hold the markers of a section exactly once.
    """
    sections = {
        "headline": joined([quickstart_line(read("quickstart.json")), trained(comparisons()), fast(read)]),
        **{name: joined(blocks) for name, blocks in figures_by_section().items()},
        "tools": joined(tool_figures()),
        "bf16": bf16(read("bf16_agreement.json")),
        "export": joined([quantized(read("export_quantized.json")), parity(read("export_parity.json"))]),
        "stream": streamed(read("stream.json")),
        "speed": speed([read(f"speed_{suite}.json") for suite in SUITES]),
    }
    texts = {}
    for page, names in PAGES.items():
        text = (ROOT / page).read_text()
        for name in names:
            begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
            section = "\n".join([begin, *sections[name], end])
            text, count = re.subn(f"{begin}.*?{end}", lambda _, new=section: new, text, flags=re.DOTALL)
            if count != 1:
                raise ValueError(f"{page} must hold the markers {begin} and {end} once, found {count}")
        texts[page] = text
    return texts


def card(name: str) -> str:
    """The model card of a preset, with the figures of that preset."""
    figures = joined(block for (of, _), block in training_figures().items() if of == name)
    coco = {"num_labels": COCO_PANOPTIC_LABELS, "thing_label_ids": COCO_THINGS}
    config = preset(name, **coco if name.startswith(ON_COCO) else {"num_labels": ADE20K_LABELS})
    about = PRESETS[name]
    return str(preset_card(name, config, summary=about.summary, paper=about.paper, figures=figures))


def figures_by_section() -> dict[str, list[list[str]]]:
    """Section of docs/results.md -> its blocks."""
    sections: dict[str, list[list[str]]] = {name: [] for name in ("comparison", "start")}
    for (_, what), block in training_figures().items():
        sections.setdefault(what.split()[0], []).append(block)
    return sections


def training_figures() -> dict[tuple[str, str], list[str]]:
    """(preset, section and what was measured) -> lines of Markdown."""
    figures = {(QUICKSTART_PRESET, "quickstart"): quickstart(read("quickstart.json"))}
    for rows in comparisons():
        ours = next(row["preset"] for row in rows if row["model"] == OURS)
        conditions = json.dumps(rows[0]["conditions"], sort_keys=True)
        figures[ours, f"comparison {conditions}"] = comparison(rows, latencies())
    for data, trained_preset in CONVERGENCE_PRESETS.items():
        rows = read_rows(RESULTS / f"convergence_{data}.json")
        if rows:
            figures[trained_preset, f"start {data}"] = convergence(data, rows)
    figures[PADDING_PRESET, "padding"] = padding(read("padding.json"))
    figures[MEMBERS_PRESET, "members"] = members(read_rows(RESULTS / "members.json"))
    figures[FAMILY, "realtime"] = realtime(read("realtime.json"))
    figures[FAMILY, "complexity"] = complexity(read("complexity.json")["rows"])
    return figures


def comparisons() -> list[list[dict[str, Any]]]:
    """Rows of the training comparisons, one list for the same conditions, where a model of ours is among them."""
    found = []
    for path in sorted(RESULTS.glob("train_compare_*.json")):
        tables: dict[str, list[dict[str, Any]]] = {}
        for row in read_rows(path):
            tables.setdefault(json.dumps(row["conditions"], sort_keys=True), []).append(row)
        found += [rows for rows in tables.values() if any(row["model"] == OURS for row in rows)]
    return found


def latencies() -> dict[str, float]:
    """Milliseconds from the pixels of an image to its map, by preset or peer, for as many classes as CamVid has."""
    rows = [row for row in read("realtime.json")["rows"] if row["labels"] == CAMVID_LABELS]
    ours = {row["preset"]: row["ms"]["whole"] for row in rows}
    return {**ours, "segformer": rows[0]["peer_ms"]["whole"]} if rows else {}


def tool_figures() -> list[list[str]]:
    return [metrics(read("metrics.json")), loading(read("batch_memory.json"), read("indexing.json"))]


def joined(blocks: Iterable[list[str]]) -> list[str]:
    """The blocks with an empty line between them."""
    return [line for number, block in enumerate(blocks) for line in ([""] if number else []) + block]


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def quickstart(result: dict[str, Any]) -> list[str]:
    conditions = f"{machine(result['machine'])}, seed {result['seed']}"
    return [
        f"`make quickstart` ({conditions}): {result['training_minutes']:.0f} minutes from random weights, "
        f"{result['images']} unseen scenes.",
        "",
        "| mIoU | PQ | PQ things | PQ stuff | mask AP |",
        "|---|---|---|---|---|",
        "| " + " | ".join(f"{result[key]:.3f}" for key in ("mean_iou", "pq", "pq_things", "pq_stuff", "map")) + " |",
    ]


def quickstart_line(result: dict[str, Any]) -> list[str]:
    return [
        f"`make quickstart` ({machine(result['machine'])}, seed {result['seed']}) reaches PQ {result['pq']:.2f} and "
        f"mIoU {result['mean_iou']:.2f} on {result['images']} unseen scenes after "
        f"{result['training_minutes']:.0f} minutes."
    ]


def convergence(data: str, rows: list[dict[str, Any]]) -> list[str]:
    """Each measure for a fast start alone, as a change of the recipe that has them together."""
    machines = ", ".join(sorted({row["hardware"] for row in rows}))
    return [
        f"Start from random weights on {data} (`benchmarks/convergence.py --data {data}`, {machines}): the recipe, "
        "and the recipe with one change; mean over the seeds (least to most), whole validation split.",
        "",
        table(data, rows),
    ]


def padding(result: dict[str, Any]) -> list[str]:
    tight, *wider = result["rows"]
    parts = [f"{row['mean_iou']:.3f} on {row['height']}x{row['width']}" for row in wider]
    return [
        f"Padding (`benchmarks/padding.py`, the CamVid model, {result['images']} images of unchanged size): "
        f"mIoU {tight['mean_iou']:.3f} on the tight canvas {tight['height']}x{tight['width']}, {', '.join(parts)}."
    ]


SHOWN_METRICS = (
    ("maps to result", "evaluate mean_iou"),
    ("predicted ids to result", "panopticapi single core"),
    ("PNG files to result", "panopticapi single core"),
    ("PNG colours to result", "panopticapi single core"),
    ("dense masks to result", "pycocotools"),
)
# What a way of the benchmark leaves unsaid.
WAY_NAMES = {
    "predicted ids to result": "predicted ids to result (the peer writes and reads PNG)",
    "PNG colours to result": "PNG colours in memory to result",
}


def members(rows: list[dict[str, Any]]) -> list[str]:
    """Of each length of training one table."""
    lines: list[str] = []
    for minutes in sorted({row["minutes"] for row in rows}):
        chosen = [row for row in rows if row["minutes"] == minutes]
        seeds = ", ".join(sorted({str(row["seed"]) for row in chosen}))
        lines += [
            *([""] if lines else []),
            f"Members on drawn scenes of 128x128 (`benchmarks/members.py`, {chosen[0]['hardware']}, seed {seeds}): "
            f"{minutes:g} minutes each from random weights, the same recipe, 100 unseen scenes.",
            "",
            *members_table(chosen).splitlines(),
        ]
    return lines


def speed(results: list[dict[str, Any]]) -> list[str]:
    """All suites in one table; the deformable formulation for exporters stays in the JSON."""
    machines = ", ".join(sorted({f"{result['hardware']}, {result['clock']}" for result in results}))
    versions = ", ".join(sorted({result["transformers"] for result in results}))
    lines = [
        f"Beside transformers {versions}, the same weights and inputs, float32, in one process by turns, medians "
        f"(`benchmarks/speed.py --suite SUITE --threads 1`; {machines}):",
        "",
        "| suite | what | ours | transformers | times as fast | aim | peak memory, part of transformers' | aim |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for row in result["rows"]:
            if row["side"] != "ours":
                continue
            peak, peak_aim = row.get("part_of_peak_mib"), row.get("peak_aim")
            cells = [
                result["suite"],
                row["title"],
                duration(row["seconds"]),
                duration(row["transformers_seconds"]),
                f"{row['times_as_fast']:.2f}",
                "-" if row["aim"] is None else f"{row['aim']:g}",
                "-" if peak is None else f"{peak:.2f}",
                "-" if peak_aim is None else f"{peak_aim:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def bf16(result: dict[str, Any]) -> list[str]:
    return [
        f"A model of {result['parameters'] / 1e6:.1f}M parameters trained on {result['data']}, all {result['images']} "
        f"images of the {result['split']} split (`benchmarks/bf16_agreement.py`, {result['hardware']}): "
        f"{100 * result['equal']:.2f} % of the pixels keep their class in bf16 (at least "
        f"{100 * result['least_equal']:.1f} % is wanted), mIoU {result['mean_iou']:.4f} in float32 and "
        f"{result['mean_iou_bf16']:.4f} in bf16."
    ]


def quantized(result: dict[str, Any]) -> list[str]:
    size = "x".join(map(str, result["canvas"]))
    return [
        f"Smaller forms of {result['model']} trained on {result['data']} (`benchmarks/export_quantized.py`, "
        f"onnxruntime, one image of {size}, {result['hardware']}, CPU time, medians of {result['repeats']}; score on "
        "the validation split):",
        "",
        *quantized_table(result["rows"]).splitlines(),
    ]


def streamed(result: dict[str, Any]) -> list[str]:
    first, *_, last = result["resident_mib"]
    return [
        f"A stream of {result['frames']} CamVid images through the quickstart's model (`benchmarks/stream.py`, "
        f"{result['hardware']}): all in order, {result['frames_per_second']:.1f} a second, {first:.0f} MiB in use at "
        f"the beginning and {last:.0f} at the end."
    ]


def parity(result: dict[str, Any]) -> list[str]:
    sizes = ", ".join(f"{size}x{size}" for size in result["rows"][0]["sizes"])
    return [
        f"ONNX files in onnxruntime beside the model in torch, full width, {sizes} (`benchmarks/export_parity.py`); "
        "the largest difference, measured by the largest logit. Weights are random, or trained for some steps on "
        "built-in scenes (`--train-steps`). Masked attention decides by the sign of a mask logit what a query sees: "
        "rounding decides where one is almost 0, and a query's outputs change by any amount. Where a difference is "
        f"above {result['tolerance']:g}, the second figure is the one to the model's outputs for the same image with "
        "its pixels changed by a hundred-thousandth; without one, the model's own outputs move as much so.",
        "",
        "| preset | weights | file | class logits | mask logits |",
        "|---|---|---|---|---|",
        *(parity_line(row) for row in result["rows"]),
    ]


def parity_line(row: dict[str, Any]) -> str:
    name = f"{row['preset']} | {'trained ' + str(row['train_steps']) + ' steps' if row['train_steps'] else 'random'}"
    outputs = ("class_queries_logits", "masks_queries_logits")
    if "error" in row:
        own = [f"{row['rounding'][output]:.0e} in torch" for output in outputs]
        return f"| {name} | {row['error']} | {' | '.join(own)} |"
    kind = "one for any size" if row["free_size"] else "one for each size"
    moved = row.get("largest_difference_in_last_digits", {})
    differences = [
        f"{row['largest_difference'][output]:.0e}" + (f", {moved[output]:.0e}" if output in moved else "")
        for output in outputs
    ]
    return f"| {name} | {kind} | {' | '.join(differences)} |"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def realtime(result: dict[str, Any]) -> list[str]:
    size, threads = f"{result['size']}x{result['size']}", result["threads"]
    return [
        f"From the pixels of one image of {size} to its map of classes, beside transformers' SegFormer-B0 "
        f"(`benchmarks/realtime.py --threads {threads}`, {result['hardware']}, by turns, CPU time, medians of "
        f"{result['repeats']}):",
        "",
        *realtime_table(result["rows"]).splitlines(),
    ]


def complexity(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "Parameters and multiply-adds beside the published ones (`benchmarks/complexity.py`, which says what is "
        "counted):",
        "",
        *complexity_table(rows).splitlines(),
    ]


def metrics(result: dict[str, Any]) -> list[str]:
    names = {
        "mean_iou": "mean IoU",
        "panoptic_quality": "PQ",
        "average_precision": "mask AP",
    }
    rows = [
        f"| {names[row['metric']]}, {WAY_NAMES.get(row['way'], row['way'])} | {row['data']} | "
        f"{row['ours_cpu_ms']:.1f} ms | {row['peer']}: {row['peer_cpu_ms']:.0f} ms | "
        f"{row['ratio']:.1f} ({row['ratio_least']:.1f} to {row['ratio_greatest']:.1f}) |"
        for row in result["rows"]
        if (row["way"], row["peer"]) in SHOWN_METRICS and row["data"].endswith("images") and "synth" in row["data"]
    ]
    added = max(row["added_mb"] for row in result["memory"])
    peak = max(row["peak_mb"] for row in result["memory"])
    return [
        f"Metrics (`benchmarks/metrics.py`, {result['machine']['cpu']}, interleaved, CPU time, medians of "
        f"{result['repeats']} rounds; more rows in benchmarks/results/metrics.json):",
        "",
        "| metric | data | ours | peer | times as fast |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "From PNG files both sides mostly wait for the PNG decoder. "
        f"Evaluating {result['memory_images']} images of 1024x1024 with 100 instances each adds at most {added} MB to "
        f"what the imported libraries hold, {peak} MB in all.",
    ]


def loading(batch: dict[str, Any], index: dict[str, Any]) -> list[str]:
    ours = next(row for row in batch["rows"] if row["path"] == "ours")
    peer = next(row for row in batch["rows"] if row["path"] == "maskformer")
    made = next(row for row in index["rows"] if row["images"] == 1000)
    return [
        f"A batch of one {batch['size']}x{batch['size']} image with {batch['instances']} instances "
        f"(`benchmarks/batch_memory.py`) takes {ours['peak_mib']:.0f} MiB at its peak, with transformers' MaskFormer "
        f"processor {peer['peak_mib']:.0f} MiB. {made['images']} COCO images with {made['segments']} annotations "
        f"(`benchmarks/indexing.py`, {index['cores']} CPU core) are indexed in {made['cold_s']:.1f} s and opened "
        f"again in {made['cached_s']:.1f} s.",
    ]


def machine(described: dict[str, Any]) -> str:
    threads = described["threads"]
    return described["device"] if threads == 2 else f"{described['device']}, {threads} thread"


if __name__ == "__main__":
    main()
