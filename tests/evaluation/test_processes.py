"""Two processes that share the images return, each of them, what one process returns."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("process_worker.py")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_two_processes_equal_one(tmp_path):
    from evaluation import process_worker

    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen([sys.executable, str(WORKER), str(tmp_path)], env={**shared, "RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    expected = json.loads(json.dumps(process_worker.evaluated(across_processes=False)))
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["images"] == expected["images"]
        assert found["worst"] == expected["worst"]
        assert found["confusion"] == expected["confusion"]
        assert set(found["metrics"]) == set(expected["metrics"])
        for name, value in expected["metrics"].items():
            assert_close(found["metrics"][name], value, name)
    assert len(expected["metrics"]["per_category"]) > 1


def assert_close(found, expected, name):
    """Equal but for the order of the additions, entry by entry of lists and dicts."""
    assert type(found) is type(expected), name
    if isinstance(expected, dict):
        assert list(found) == list(expected), name
        for key, value in expected.items():
            assert_close(found[key], value, f"{name}, {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), name
        for index, value in enumerate(expected):
            assert_close(found[index], value, f"{name}, entry {index}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-14, nan_ok=True), name
    else:
        assert found == expected, name
