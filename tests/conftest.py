"""Fixtures for every test: where the real data is, a quiet single-threaded torch, tiny data sets."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA_VARIABLE = "HF_MASKFORMER_DATA"

# No test may reach the network; this must stand before transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models gain nothing from threads, and sums of several threads can differ in the last bit between two processes
# that a test compares. This must stand before torch is imported; it reaches the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with camvid, nuclei, hippocampus, coco_panoptic_sample; the test is skipped where it is absent."""
    path = Path(os.environ.get(DATA_VARIABLE, ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real data is neither at ../shared/data nor at ${DATA_VARIABLE}")
    return path


@pytest.fixture
def project_root() -> Path:
    return ROOT
