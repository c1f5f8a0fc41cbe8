"""The README's table of presets says what the package has."""

import re

import torch

from hf_maskformer import HfMaskFormerForUniversalSegmentation, list_presets, preset


def test_table_of_presets_is_complete_and_counts_are_right(project_root):
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| ([\d.]+)M \|$", (project_root / "README.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(list_presets())
    for name, millions in rows:
        with torch.device("meta"):
            model = HfMaskFormerForUniversalSegmentation(preset(name, num_labels=150))
        count = sum(parameter.numel() for parameter in model.parameters())
        assert f"{count / 1e6:.1f}" == millions, name
