"""The rules of test_architecture.py themselves: each is fed a bad snippet and must catch it."""

import pytest

from test_architecture import (
    MAX_LINES,
    arrow_breaches,
    cycle_breaches,
    import_graph,
    length_breaches,
    model_breaches,
    pickle_breaches,
    travel_breaches,
)

BASE = {"model.masks": "", "model.modeling_hf_maskformer": "", "data.load": "", "cli.main": "", "training.train": ""}


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("data.load", "from hf_maskformer.training.train import train"),
        ("data.load", "import hf_maskformer.model.modeling_hf_maskformer"),
        ("data.load", "def f():\n    from hf_maskformer.cli import main"),
        ("model.masks", "from ..data.load import load"),
        ("training.train", "from ..cli.main import main"),
        ("attic.old", ""),
    ],
)
def test_an_arrow_upward_is_caught(module, text):
    assert arrow_breaches(import_graph({**BASE, module: text}))


def test_an_arrow_downward_is_not():
    texts = {
        **BASE,
        "data.load": "from hf_maskformer.model.masks import x",
        "cli.main": "import hf_maskformer.data.load",
    }
    assert arrow_breaches(import_graph(texts)) == []
    assert import_graph(texts)["cli.main"] == {"data.load"}


def test_a_lazy_cycle_is_caught():
    texts = {"data.a": "from hf_maskformer.data import b", "data.b": "def f():\n    from .a import x"}
    assert cycle_breaches(import_graph(texts))
    assert cycle_breaches(import_graph({**texts, "data.b": ""})) == []


def test_processing_that_reaches_a_part_through_another_file_is_caught():
    texts = {
        "model.postprocess": "from .masks import x",
        "model.masks": "from .layers import MLP",
        "model.layers": "",
    }
    assert model_breaches(import_graph(texts))
    assert model_breaches(import_graph({**texts, "model.masks": ""})) == []


def test_a_part_that_reads_the_config_is_caught():
    texts = {"model.mask_head": "from .configuration_hf_maskformer import C", "model.configuration_hf_maskformer": ""}
    assert model_breaches(import_graph(texts)) == ["model.mask_head reaches model.configuration_hf_maskformer"]


def test_a_long_file_is_caught():
    assert length_breaches({"src/a.py": MAX_LINES + 1})
    assert length_breaches({"src/a.py": MAX_LINES}) == []


@pytest.mark.parametrize(
    "text",
    [
        "from ..data import x",
        "from .sub.x import y",
        "from . import masks",
        "from .ghost import y",
        "from hf_maskformer.model.masks import x",
        "import hf_maskformer",
        "import importlib\nimportlib.import_module('.masks')",
        "import scipy",
        "def f():\n    from timm import create_model",
        "if is_scipy_available() and True:\n    import scipy",
        "if is_ghost_available():\n    import ghost",
        "if is_scipy_available():\n    pass\nelse:\n    import scipy",
        '"""Usage:\nfrom .masks import x\n"""',
    ],
)
def test_an_import_that_does_not_travel_is_caught(text):
    assert travel_breaches("x", text, {"masks"})


@pytest.mark.parametrize(
    "text",
    [
        "import torch\nimport math\nfrom .masks import x",
        "if is_scipy_available():\n    from scipy.optimize import linear_sum_assignment",
        "try:\n    import timm\nexcept ImportError:\n    timm = None",
        '""">>> from .masks import x"""',
    ],
)
def test_an_import_that_travels_is_not(text):
    assert travel_breaches("x", text, {"masks"}) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "def f():\n    from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=True)",
        "from torch import load",
    ],
)
def test_a_pickle_is_caught(text):
    assert pickle_breaches("x", text)
    assert pickle_breaches("x", "import json\nnp.load(path, allow_pickle=False)") == []
