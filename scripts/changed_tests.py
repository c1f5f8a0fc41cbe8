"""Print the tests that mirror what changed since the last commit: python scripts/changed_tests.py"""

import subprocess
from pathlib import Path


def mirrored(path: Path) -> Path | None:
    """The test file of a source file, else the test folder of its room; a test file is its own."""
    if path.parts[0] == "tests":
        return path if path.name.startswith("test_") and path.exists() else None
    if path.parts[:2] != ("src", "hf_maskformer"):
        return None
    room = Path("tests", *path.parts[2:-1])
    test = room / f"test_{path.name}"
    return test if test.exists() else room if room.name != "tests" and room.exists() else None


if __name__ == "__main__":
    status = subprocess.run(["git", "status", "--porcelain", "-uall"], capture_output=True, text=True, check=True)
    changed = [Path(line[3:].split(" -> ")[-1]) for line in status.stdout.splitlines() if line.endswith(".py")]
    tests = {str(test) for test in map(mirrored, changed) if test is not None}
    print("\n".join(sorted(tests | {"tests/test_architecture.py"})))
