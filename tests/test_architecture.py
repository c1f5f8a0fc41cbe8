"""The rooms of the package, who may import whom, and what may travel to the Hub: data, checked by reading the sources.

Imports inside functions count. Each rule has a test in test_architecture_rules.py that feeds it a bad snippet and sees
it caught.
"""

import ast
import re
import sys
from pathlib import Path

import pytest
from transformers.utils import import_utils

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "hf_maskformer"
SOURCE = ROOT / "src" / PACKAGE
MAX_LINES = 400
MAX_SCRIPT_LINES = 30

# Files allowed to be longer, and why.
LONG_FILES: dict[str, str] = {}

# Room -> what it may import: a room, or single modules of one. Its own room is always allowed.
SHARED = {"model.masks", "model.label_spec"}
EVERY_ROOM = {"cli", "training", "data", "evaluation", "evaluation.evaluate", "model", "presets", "visualize"}
EVERY_ROOM |= {"inference", "hub", "export", "benchmark", "demo"}
# What runs models over data sets; the other modules of evaluation/ are metrics, which know neither.
EVALUATE_ROOM = {f"evaluation.{name}" for name in ("evaluate", "scorers", "report", "confusion_plot")}
ARROWS: dict[str, set[str]] = {
    "cli": EVERY_ROOM,
    "training": {"data", "evaluation", "evaluation.evaluate", "model", "presets", "visualize", "hub"},
    "inference": {"model", "data", "visualize"},
    "evaluation.evaluate": {"evaluation", "model", "data", "visualize"},
    "data": SHARED | {"model.image_conversion"},  # one rule for image modes, in the processor and in the readers
    "evaluation": SHARED,
    "visualize": SHARED | {"palette"},
    "palette": set(),
    "export": {"model", "data", "inference"},
    "hub": {"model", "data", "inference"},
    "benchmark": {"model", "data", "inference"},
    # image_processor_for(config) writes the processor's file from the same numbers as the model's.
    "presets": {"model.configuration_hf_maskformer", "model.image_processing_hf_maskformer"},
    "demo": {"inference", "visualize"},
    "__init__": {"model", "presets", "inference"},
    "model": set(),
}

# Inside model/: a pattern of file names -> file names it must not reach, directly or through others.
PARTS = (
    r"backbone|layers|position_encoding|deformable_attention|pixel_decoder_\w+|query_decoder_\w+|query_graph|\w+_head"
    r"|attention_masks|boxes"
)
LOSSES = r"criterion|point_criterion|location_criterion|matcher|losses|point_sampling|denoising"
PROCESSING = r"image_processing_hf_maskformer|postprocess|tiling|masks|mask_runs|polygons|label_spec|image_conversion"
PROCESSING += r"|target_encoding|target_inputs|resampling|cell_grid|mask_codes"
MODEL_MUST_NOT_REACH = {
    PROCESSING: rf"modeling_hf_maskformer|{PARTS}|{LOSSES}",
    PARTS: rf"modeling_hf_maskformer|configuration_hf_maskformer|{LOSSES}",
    LOSSES: r"modeling_hf_maskformer|configuration_hf_maskformer|backbone|pixel_decoder_\w+|query_decoder_\w+",
    "configuration_hf_maskformer": rf"modeling_hf_maskformer|{PARTS}|{LOSSES}",
}

TRAVELS_UNGUARDED = {"torch", "numpy", "transformers", "huggingface_hub", "safetensors"}
# Metrics are arrays in, numbers out; `evaluate` only inside as_evaluate_module.
METRICS_MAY_IMPORT = {"numpy", "torch", "scipy", "evaluate", "datasets", PACKAGE}
PICKLE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


# --- reading sources -------------------------------------------------------------------------------------------------


def sources(root: Path = SOURCE) -> dict[str, str]:
    """Module name inside the package ("model.masks", "cli.__init__") -> its text."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path.read_text() for path in sorted(root.rglob("*.py"))
    }


def imported_modules(name: str, text: str, modules: set[str]) -> set[str]:
    """Modules of the package that `name` imports anywhere, relative or absolute, `from room import x` included."""
    found = set()
    parents = name.split(".")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = parents[: len(parents) - node.level + 1]
                base = ".".join([PACKAGE, *above, *([base] if base else [])])
            targets = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for target in targets:
            inside = target.removeprefix(PACKAGE).lstrip(".") if target.split(".")[0] == PACKAGE else None
            if inside is None:
                continue
            found |= {inside} & modules
            # A name that only a package's __init__ can provide.
            if f"{inside}.__init__" in modules and not any(other.startswith(f"{target}.") for other in targets):
                found.add(f"{inside}.__init__")
    return found - {name}


def import_graph(texts: dict[str, str]) -> dict[str, set[str]]:
    return {name: imported_modules(name, text, set(texts)) for name, text in texts.items()}


def room_of(module: str) -> str:
    return "evaluation.evaluate" if module in EVALUATE_ROOM else module.split(".")[0]


def external_roots(text: str) -> set[str]:
    """First components of everything imported that is neither the standard library nor relative."""
    roots = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            roots.add((node.module or "").split(".")[0])
    return roots - set(sys.stdlib_module_names)


# --- the rules: each returns breaches in words -----------------------------------------------------------------------


def arrow_breaches(graph: dict[str, set[str]]) -> list[str]:
    breaches = []
    for name, imported in graph.items():
        room = room_of(name)
        if room not in ARROWS:
            breaches.append(f"{name}: room {room!r} is not in ARROWS")
            continue
        for target in sorted(imported):
            allowed = ARROWS[room] | {room}
            if room_of(target) not in allowed and target not in allowed:
                breaches.append(f"{name} imports {target}; {room} may import {sorted(ARROWS[room])}")
    return breaches


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    stack = list(graph.get(start, ()))
    while stack:
        module = stack.pop()
        if module not in seen:
            seen.add(module)
            stack += graph.get(module, ())
    return seen


def cycle_breaches(graph: dict[str, set[str]]) -> list[str]:
    return [f"{name} imports itself through {sorted(graph[name])}" for name in graph if name in reachable(graph, name)]


def model_breaches(graph: dict[str, set[str]]) -> list[str]:
    breaches = []
    for pattern, forbidden in MODEL_MUST_NOT_REACH.items():
        for name in graph:
            if re.fullmatch(rf"model\.({pattern})", name):
                for target in sorted(reachable(graph, name)):
                    if re.fullmatch(rf"model\.({forbidden})", target):
                        breaches.append(f"{name} reaches {target}")
    return breaches


def length_breaches(lines: dict[str, int]) -> list[str]:
    over = {name: count for name, count in lines.items() if count > MAX_LINES}
    long = [f"{name} has {count} lines" for name, count in over.items() if name not in LONG_FILES]
    stale = [f"{name} is on the list of long files" for name in LONG_FILES if name not in over]
    return long + stale


def is_availability_check(test: ast.expr) -> bool:
    """A bare `is_xxx_available()` that transformers knows; nothing else makes its scanner pass over an import."""
    return (
        isinstance(test, ast.Call)
        and isinstance(test.func, ast.Name)
        and not test.args
        and re.fullmatch(r"is_\w+_available", test.func.id) is not None
        and hasattr(import_utils, test.func.id)
    )


def unguarded_imports(node: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [node]
    children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If) and is_availability_check(node.test):
        children = list(node.orelse)
    elif isinstance(node, ast.Try):
        children = [*node.handlers, *node.orelse, *node.finalbody]
    return [found for child in children for found in unguarded_imports(child)]


def travel_breaches(name: str, text: str, siblings: set[str]) -> list[str]:
    """What would break when this file of model/ is copied to the Hub and loaded without the package."""
    tree = ast.parse(text)
    breaches = []
    import_lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            import_lines.add(node.lineno)
            if node.level > 1 or node.module is None or "." in node.module:
                breaches.append(f"{name}:{node.lineno}: only `from .sibling import x` travels")
            elif node.module not in siblings:
                breaches.append(f"{name}:{node.lineno}: .{node.module} is no file of this folder")
        if isinstance(node, (ast.Import, ast.ImportFrom)) and PACKAGE in external_roots(ast.unparse(node)):
            breaches.append(f"{name}:{node.lineno}: imports the package by its absolute name")
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            breaches.append(f"{name}:{node.lineno}: imports by a string")
    for number, line in enumerate(text.splitlines(), start=1):
        if re.match(r"\s*from\s+\.", line) and number not in import_lines:
            breaches.append(f"{name}:{number}: a line of text that begins like a relative import")
    for node in unguarded_imports(tree):
        for root in sorted(external_roots(ast.unparse(node)) - TRAVELS_UNGUARDED - {PACKAGE}):
            breaches.append(f"{name}:{node.lineno}: {root} is not under `if is_xxx_available():`")
    return breaches


def pickle_breaches(name: str, text: str) -> list[str]:
    breaches = [f"{name} imports {root}" for root in sorted(imported_roots(text) & PICKLE_MODULES)]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in {"torch.load", "torch.save"} or any(
                keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False" for keyword in node.keywords
            ):
                breaches.append(f"{name}:{node.lineno}: {called} reads or writes a pickle")
        if (
            isinstance(node, ast.ImportFrom)
            and node.module == "torch"
            and {"load", "save"} & {a.name for a in node.names}
        ):
            breaches.append(f"{name}:{node.lineno}: imports torch's load or save")
    return breaches


def imported_roots(text: str) -> set[str]:
    """As `external_roots`, with the standard library."""
    roots = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            roots.add(node.module.split(".")[0])
    return roots


# --- this repository -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts():
    return sources()


@pytest.fixture(scope="module")
def graph(texts):
    return import_graph(texts)


def test_imports_follow_the_arrows(graph):
    assert arrow_breaches(graph) == []


def test_no_import_cycle(graph):
    assert cycle_breaches(graph) == []


def test_parts_losses_and_processing_stay_apart(graph):
    assert model_breaches(graph) == []


def test_files_are_short():
    paths = [path for folder in ("src", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert length_breaches({str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in paths}) == []


def test_scripts_are_thin():
    lines = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "scripts").glob("*.py")}
    assert lines
    assert {name: count for name, count in lines.items() if count > MAX_SCRIPT_LINES} == {}


def test_the_model_travels(texts):
    siblings = {name.removeprefix("model.") for name in texts if re.fullmatch(r"model\.\w+", name)}
    assert "modeling_hf_maskformer" in siblings
    breaches = [
        breach
        for name in sorted(siblings - {"__init__"})
        for breach in travel_breaches(name, texts[f"model.{name}"], siblings - {"__init__"})
    ]
    assert breaches == []


def test_the_model_is_one_flat_folder():
    assert [path.name for path in (SOURCE / "model").iterdir() if path.is_dir() and path.name != "__pycache__"] == []


def test_metrics_know_no_models_and_no_files(texts):
    for name, text in texts.items():
        if room_of(name) == "evaluation":
            assert external_roots(text) <= METRICS_MAY_IMPORT, name


def test_no_pickle_is_read_or_written():
    paths = [path for folder in ("src", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert [breach for path in paths for breach in pickle_breaches(path.name, path.read_text())] == []
