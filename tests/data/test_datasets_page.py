"""docs/datasets.md: its examples run one after the other, and its table of formats and options is complete."""

import re

from hf_maskformer.data.formats import FORMAT_TASKS
from hf_maskformer.data.hub import HUB_OPTIONS


def test_the_examples_run(project_root, tmp_path, monkeypatch, capsys):
    page = (project_root / "docs" / "datasets.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "docs/datasets.md", "exec"), {})
    assert "semantic 4 (6, 8)" in capsys.readouterr().out


def test_every_format_and_option_is_named(project_root):
    page = (project_root / "docs" / "datasets.md").read_text()
    missing = [name for name in (*FORMAT_TASKS, *HUB_OPTIONS) if f"`{name}`" not in page]
    assert missing == []
    for name, tasks in FORMAT_TASKS.items():
        if name != "hub":
            assert re.search(rf"^\| `{name}` \|.*\| {', '.join(tasks)} \|", page, re.MULTILINE), name
